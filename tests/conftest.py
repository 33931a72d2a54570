"""How the suite runs on several cores, and fixtures that several packages share.

`make test` runs the files of tests in one worker for each core (pytest-xdist), each pinned to its core: the engine's
threads then number one for each worker and do not compete, and neither do the processes that a test starts.
"""

import gc
import math
import os

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None and hasattr(os, "sched_setaffinity"):  # before torch counts the cores
    _usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_usable[int(WORKER.removeprefix("gw")) % len(_usable)]})

import pytest  # noqa: E402

from bench import machine  # noqa: E402
from bench.loadgen import recording  # noqa: E402
from engine.machine import cores  # noqa: E402

MOST_WORKERS = 8
# Files that take longest come first, so that no worker ends with one of them while the others have none.
LONGEST = (
    "test_multiprocess.py", "test_served_parity.py", "test_sweep.py", "test_report.py", "test_lora.py",
    "test_replicas_served.py", "test_sweep_rounds.py", "test_serve.py", "test_serve_engine.py", "test_run.py",
    "test_ranks.py", "test_parity.py", "test_ranks_served.py", "test_cache_hits.py", "test_serve_processes.py",
    "test_native_served.py", "test_closed.py", "test_bench.py", "test_broadcast.py", "test_figures.py",
)  # fmt: skip


def pytest_xdist_auto_num_workers() -> int:
    return min(cores(), MOST_WORKERS)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if WORKER is not None:
        order = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="module", autouse=True)
def _small_heap() -> None:
    """Each load point collects garbage first, which takes a second where all modules of the suite are searched."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def patient_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests over real sockets that aren't about the generator or the machine: a busy one spoils no point."""
    monkeypatch.setattr(machine, "DISTURBED_SHARE", math.inf)
    for limit in ("CPU_SHARE_LIMIT", "DELAY_LIMIT_S", "DELAY_FLOOR_S", "STARVED_FLOOR_S"):
        monkeypatch.setattr(recording, limit, math.inf)
