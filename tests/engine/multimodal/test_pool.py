"""Processes of the pool: results, errors, deaths, and what is left in shared memory."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ProcessingError, RequestError
from engine.frontend.front_end_stats import MMCounters
from engine.multimodal import pool as pool_module
from engine.multimodal.feature_files import read_features
from engine.multimodal.pool import MediaPool
from engine.multimodal.pool_protocol import PoolOptions
from tests.engine.multimodal.fake_processor import EMBEDDING, FACTORY, png


def run(body: Callable[[MediaPool, MMCounters], Awaitable[None]], processes: int = 1, **options: float) -> None:
    """Run a test with a pool of fake processors."""

    async def main() -> None:
        counters = MMCounters()
        pool = MediaPool(PoolOptions(FACTORY, {}), processes, counters, **options)
        pool.open()
        try:
            await body(pool, counters)
        finally:
            pool.close()

    asyncio.run(main())


def test_a_picture_becomes_a_file_with_its_tensors(tmp_path: Path) -> None:
    async def body(pool: MediaPool, counters: MMCounters) -> None:
        path = str(tmp_path / "one")
        done = await pool.submit(png(200), 2, {}, path)
        assert done.tokens == [EMBEDDING] * 4
        assert done.grid == (1, 1, 2)
        assert done.size == os.path.getsize(path)
        found = read_features(path)
        assert (found["pixels"] == np.array([200, 0, 0])).all()
        assert found["count"] == [2]
        assert (counters.get("jobs"), counters.get("failures"), counters.get("processes")) == (1, 0, 1)
        assert os.getpriority(os.PRIO_PROCESS, pool.pids[0]) > os.getpriority(os.PRIO_PROCESS, 0)

    run(body)


def test_the_pool_has_started_once_its_first_process_takes_jobs(tmp_path: Path) -> None:
    async def body(pool: MediaPool, counters: MMCounters) -> None:
        assert not pool.pids
        await pool.started()
        assert len(pool.pids) == counters.get("processes") == 1
        await pool.submit(png(1), 1, {}, str(tmp_path / "one"))

    run(body)


def test_waiting_for_the_start_ends_if_there_is_none() -> None:
    async def main() -> None:
        broken = MediaPool(PoolOptions("no.such.module:make", {}), 1, MMCounters())
        broken.open()
        await broken.started()
        assert not broken.pids
        broken.close()
        closed = MediaPool(PoolOptions(FACTORY, {}), 1, MMCounters())
        closed.open()
        closed.close()
        await closed.started()

    asyncio.run(main())


def test_errors_end_only_their_job(tmp_path: Path) -> None:
    async def body(pool: MediaPool, counters: MMCounters) -> None:
        jobs = [
            pool.submit(png(1), 1, {"refuse": True}, str(tmp_path / "a")),
            pool.submit(png(2), 1, {"fail": True}, str(tmp_path / "b")),
            pool.submit(png(3), 1, {}, str(tmp_path / "c")),
        ]
        refused, failed, done = await asyncio.gather(*jobs, return_exceptions=True)
        assert isinstance(refused, RequestError)
        assert refused.field == "image_url"
        assert isinstance(failed, ProcessingError)
        assert "the image could not be processed: ZeroDivisionError: by zero" in str(failed)
        assert not isinstance(done, BaseException)
        assert os.listdir(tmp_path) == ["c"]
        assert (counters.get("jobs"), counters.get("failures")) == (3, 2)
        assert len(pool.pids) == 1

    run(body)


def test_a_process_that_dies_fails_its_job_and_is_replaced(tmp_path: Path) -> None:
    async def body(pool: MediaPool, counters: MMCounters) -> None:
        await pool.submit(png(0), 1, {}, str(tmp_path / "0"))
        first = pool.pids[0]
        dying = asyncio.ensure_future(pool.submit(png(1), 1, {"sleep": 60}, str(tmp_path / "1")))
        queued = [asyncio.ensure_future(pool.submit(png(n), 1, {}, str(tmp_path / str(n)))) for n in (2, 3)]
        await asyncio.sleep(0.1)
        os.kill(first, signal.SIGKILL)
        with pytest.raises(ProcessingError, match=r"process \d+\) was killed by SIGKILL.*--mm-processors"):
            await dying
        assert [len((await one).tokens) for one in queued] == [4, 4]
        assert pool.pids != [first]
        assert sorted(os.listdir(tmp_path)) == ["0", "2", "3"]
        assert counters.get("failures") == 1
        with pytest.raises(ProcessingError, match="SIGKILL"):
            await pool.submit(png(1), 1, {"die": True}, str(tmp_path / "4"))

    run(body)


def test_a_process_that_dies_without_a_job_fails_none(tmp_path: Path) -> None:
    async def body(pool: MediaPool, counters: MMCounters) -> None:
        await pool.submit(png(0), 1, {}, str(tmp_path / "0"))
        os.kill(pool.pids[0], signal.SIGKILL)
        await asyncio.sleep(0.3)
        await pool.submit(png(1), 1, {}, str(tmp_path / "1"))
        assert counters.get("failures") == 0

    run(body)


def test_an_input_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    async def body(pool: MediaPool, _: MMCounters) -> None:
        with pytest.raises(RequestError, match=r"not processed within 0\.5 s"):
            await pool.submit(png(1), 1, {"sleep": 60}, str(tmp_path / "1"))
        await pool.submit(png(1), 1, {}, str(tmp_path / "2"))

    run(body, job_timeout_s=0.5)


def test_a_process_whose_memory_grows_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "GROWTH", 64 << 20)

    async def body(pool: MediaPool, counters: MMCounters) -> None:
        await pool.submit(png(1), 1, {}, str(tmp_path / "1"))
        first = pool.pids[0]
        await pool.submit(png(1), 1, {"grow": 100}, str(tmp_path / "2"))
        await pool.submit(png(1), 1, {}, str(tmp_path / "3"))
        assert pool.pids != [first]
        assert counters.get("failures") == 0

    run(body)


def test_processes_are_added_while_jobs_wait_and_canceled_jobs_are_dropped(tmp_path: Path) -> None:
    async def body(pool: MediaPool, counters: MMCounters) -> None:
        jobs = [asyncio.ensure_future(pool.submit(png(n), 1, {"sleep": 0.3}, str(tmp_path / str(n)))) for n in range(4)]
        while len(pool.pids) < 2:
            await asyncio.sleep(0.01)
        running = jobs[:3]
        jobs[3].cancel()
        await asyncio.gather(*running)
        assert jobs[3].cancelled()
        assert counters.get("waiting") == 0
        late = asyncio.ensure_future(pool.submit(png(9), 1, {"sleep": 0.3}, str(tmp_path / "late")))
        await asyncio.sleep(0.1)
        late.cancel()
        await pool.submit(png(10), 1, {"sleep": 0.5}, str(tmp_path / "end"))
        assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "end"], "a canceled job left its file"
        assert len(pool.pids) == 2

    run(body, processes=2)


def test_a_processor_that_can_not_be_made_is_the_error_of_the_jobs(tmp_path: Path) -> None:
    async def main() -> None:
        pool = MediaPool(PoolOptions(FACTORY, {"broken": True}), 1, MMCounters())
        pool.open()
        with pytest.raises(ProcessingError, match="can't be processed: OSError: its files are gone"):
            await pool.submit(png(1), 1, {}, str(tmp_path / "1"))
        pool.close()

    asyncio.run(main())


OWNER = """
import asyncio
from engine.frontend.feature_cache import FeatureCache
from engine.frontend.front_end_stats import MMCounters
from engine.multimodal.pool import MediaPool
from engine.multimodal.pool_protocol import PoolOptions
from tests.engine.multimodal.fake_processor import FACTORY, png

async def main():
    cache, pool = FeatureCache(1 << 20, MMCounters()), MediaPool(PoolOptions(FACTORY, {}), 1, MMCounters())
    pool.open()
    path = cache.new_path()
    await pool.submit(png(1), 1, {}, path)
    print(path, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_nothing_is_left_in_shared_memory_when_the_front_end_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip()).parent
    assert len(os.listdir(folder)) == 2, "the file and the lock"
    owner.kill()
    owner.communicate()
    until = time.monotonic() + 20
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not folder.exists()
