"""Pictures through the pool of processes alone, for bench_mm_stall.py: how many a second, and their CPU time."""

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from bench.results.environment import hardware
from engine.config import EngineConfig
from engine.frontend.mm_pipeline import make_mm_options
from engine.model.resolve import resolve_model
from engine.multimodal.pool import MediaPool
from engine.multimodal.pool_protocol import PoolOptions
from engine.multimodal.types import Media
from tests.perf.stall_load import SIZE, pictures, salted

PROCESSES = (1, 2)
# A tower of 64 x 64 pixels, and processors of large models; these need no weights.
OTHERS = ("Qwen/Qwen2-VL-7B-Instruct", "mistral-community/pixtral-12b")


class Counts:
    """The counters of a pool, dropped."""

    def add(self, name: str, value: float = 1) -> None:
        pass

    def set(self, name: str, value: float) -> None:
        pass


def pool_rows(model: str, count: int) -> list[dict[str, Any]]:
    """A record for each model and number of processes."""
    given = pictures(SIZE)
    rows = []
    print(f"{count} PNG pictures of {SIZE[0]}x{SIZE[1]} through the pool: pictures/s, CPU ms a picture", flush=True)
    for name in (model, *OTHERS):
        for processes in PROCESSES:
            rate, cpu_ms = asyncio.run(measure(name, processes, count, given))
            print(f"{name:<32}{processes} processes {rate:8.2f} {cpu_ms:8.2f}", flush=True)
            rows.append(
                {
                    "part": "pool",
                    "model": name,
                    "processes": processes,
                    "picture": f"PNG, {SIZE[0]}x{SIZE[1]}",
                    "pictures": count,
                    "pictures_per_s": round(rate, 3),
                    "cpu_ms_per_picture": round(cpu_ms, 3),
                    "hardware": f"{hardware()['cpu']}, {hardware()['cores']} cores",
                }
            )
    return rows


async def measure(name: str, processes: int, count: int, given: list[bytes]) -> tuple[float, float]:
    """Pictures per second, and CPU time of the processes for each, ms; all jobs wait in the pool from the start on."""
    config = EngineConfig(model=str(resolve_model(name, dummy=True)), load_format="dummy")
    options = make_mm_options(config)
    pool = MediaPool(PoolOptions(options.factory, options.model, options.limits), processes, Counts())
    pool.open()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        try:
            # All processes have started and done their first picture.
            await asyncio.gather(*(submit(pool, given, -1 - i, folder) for i in range(4 * processes)))
            before, began = cpu_s(pool), time.monotonic()
            await asyncio.gather(*(submit(pool, given, i, folder) for i in range(count)))
            elapsed, used = time.monotonic() - began, cpu_s(pool) - before
        finally:
            pool.close()
    return count / elapsed, 1e3 * used / count


async def submit(pool: MediaPool, given: list[bytes], number: int, folder: str) -> None:
    path = Path(folder) / f"{number}.safetensors"
    await pool.submit(Media("image", salted(given[number % len(given)], str(number))), 1, {}, str(path))
    path.unlink()


def cpu_s(pool: MediaPool) -> float:
    times = [psutil.Process(pid).cpu_times() for pid in pool.pids]
    return sum(one.user + one.system for one in times)
