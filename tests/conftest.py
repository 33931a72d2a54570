"""How the suite runs on several cores, and fixtures that several packages share.

`make test` runs the files of tests in one worker for each core (pytest-xdist), each pinned to its core: the engine's
threads then number one for each worker and do not compete, and neither do the processes that a test starts.
"""

import gc
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None and hasattr(os, "sched_setaffinity"):  # before torch counts the cores
    _usable = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_usable[int(WORKER.removeprefix("gw")) % len(_usable)]})
os.environ["TRITON_INTERPRET"] = (
    "1"  # before anything imports triton: its own library is interpreted, or not, from then on
)

# In the background of a shell SIGINT is ignored, and processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from bench.loadgen import recording  # noqa: E402
from bench.measurement import machine  # noqa: E402
from engine import children  # noqa: E402
from engine.host import cores  # noqa: E402
from tests.engine.fork_server import ForkServer  # noqa: E402

# Examples have no time limit, and neither has making them: a busy machine would exceed it.
settings.register_profile("any-machine", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

TESTS = Path(__file__).parent
# `make test-triton` also runs the cases marked `exhaustive`, and all of hypothesis' examples of kernels.
ALL_OF_TRITON = os.environ.get("REDLINE_TEST_TRITON") == "1"
MOST_WORKERS = 8
# Files that take 20 s or more on one core, the longest first. Workers begin with them, so that none ends with one, and
# `make test-fast` leaves them out.
SLOW = (
    "engine/test_served_parity.py", "engine/worker/test_ray_hosts.py", "engine/test_ray_replicas.py",
    "cli/test_disaggregation_served.py", "engine/test_ray_disaggregation.py",
    "engine/worker/test_multiprocess.py", "engine/worker/test_parity.py",
    "bench/sweeps/test_sweep.py", "engine/test_ranks_served.py", "cli/test_replicas_served.py",
    "cli/test_scale_served.py",
    "bench/sweeps/test_sweep_rounds.py", "bench/measurement/test_run.py", "cli/test_serve_processes.py",
    "engine/test_vision_served.py", "cli/test_serve_engine.py", "cli/test_serve.py",
    "bench/workloads/test_cache_hits.py",
    "engine/test_mistral_format_served.py", "engine/worker/test_lora.py", "plots/test_report.py",
    "cli/test_report.py", "docs/test_blocks_run.py", "bench/measurement/test_closed_loop.py", "plots/test_figures.py",
    "engine/core/test_whatever_happens.py", "engine/test_mm_served.py", "engine/multimodal/test_pool.py",
    "cli/test_bench.py", "engine/api/test_slow_reader.py",
    "engine/test_ranks.py", "bench/loadgen/test_loop.py", "engine/test_loading.py", "cli/test_sweep.py",
    "cli/test_workload.py", "plots/test_percentiles.py", "cli/test_target_options.py", "plots/test_ablation.py",
    "bench/generators/test_generators.py", "cli/test_generate.py",
    "bench/loadgen/test_closed_loop.py", "engine/test_llm.py", "engine/test_launch.py", "plots/test_timeline.py",
    "engine/test_encoder_faults.py", "engine/test_llm_media.py", "engine/test_mistral_images.py",
    "engine/model/checkpoints/test_mistral_tensors.py",
    "engine/model/test_kv_groups.py", "engine/worker/test_driver_broadcast.py",
    "engine/worker/test_prompt_logprobs.py", "engine/kernels/triton/test_attention.py",
    "engine/worker/test_device_runner.py", "engine/worker/test_graphs.py", "engine/worker/test_triton_products.py",
    "engine/worker/test_triton_backend.py", "engine/test_documented_python.py", "cli/test_lora_served.py",
    "engine/kernels/cpu/test_stack.py", "engine/kernels/cpu/test_portable.py", "engine/model/lora/test_lora_packing.py",
    "engine/worker/test_triton_stack.py", "engine/worker/test_device_ranks.py",
    "engine/worker/test_device_rank_processes.py", "engine/worker/test_device_loading.py",
    "engine/worker/test_device_families.py", "engine/worker/test_rank_graphs.py",
    "docs/test_more_machines.py",
    "engine/worker/test_mm_parity.py", "engine/worker/test_mm_shapes.py", "engine/worker/test_mm_device.py",
)  # fmt: skip


def pytest_configure() -> None:
    missing = [name for name in SLOW if not (TESTS / name).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py names files that don't exist: {', '.join(missing)}")


def pytest_xdist_auto_num_workers() -> int:
    return min(cores(), MOST_WORKERS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {TESTS / name: place for place, name in enumerate(SLOW)}
    for item in items:
        if item.path in order:
            item.add_marker(pytest.mark.slow)
        if "exhaustive" in item.keywords and not ALL_OF_TRITON:
            item.add_marker(pytest.mark.skip(reason="make test-triton runs it"))
    if WORKER is not None:
        items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def forked_children() -> Iterator[None]:
    """Cores and ranks that a test starts from its own process are forked from one that has imported torch.

    Those of `redline serve` start as for users.
    """
    server = ForkServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children, "spawn", server.spawn)
        yield
    server.close()


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
