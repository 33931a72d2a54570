"""What a benchmark starts ends with it, however it ends."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from engine.children import process_state

ROOT = Path(__file__).parents[2]
LIMIT_S = 120.0

# Each prints the ids of the processes that must end with it.
PLAIN = """
from tests.perf.child_processes import start_child
child = start_child(["sleep", "600"])
print(child.pid, flush=True)
"""
STOPPED = """
import os, signal
from bench.child_processes import GroupEnd
from tests.perf.child_processes import start_child
# an engine with a child of its own, both stopped
engine = start_child(["sh", "-c", "sleep 600 & echo $!; wait"], start_new_session=True, stdout=-1)
end = GroupEnd(engine.pid, signal.SIGKILL)
grandchild = int(engine.stdout.readline())
os.killpg(engine.pid, signal.SIGSTOP)
print(engine.pid, grandchild, flush=True)
"""
NEIGHBOR = """
import os
from tests.perf.neighbor import neighbor
beside = neighbor("half", sorted(os.sched_getaffinity(0))[:1])
print(*beside.__enter__()._pids, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="uses prctl")
@pytest.mark.parametrize("program", [PLAIN, STOPPED, NEIGHBOR], ids=["plain", "stopped", "neighbor"])
def test_children_end_with_a_killed_benchmark(program: str) -> None:
    code = textwrap.dedent(program) + "import time; time.sleep(600)\n"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        pids = [int(pid) for pid in benchmark.stdout.readline().split()]
        assert pids
        assert all(process_state(pid) not in ("", "Z") for pid in pids)
        benchmark.send_signal(signal.SIGKILL)
        benchmark.wait(LIMIT_S)
    deadline = time.monotonic() + LIMIT_S
    while left := [pid for pid in pids if process_state(pid) not in ("", "Z")]:
        assert time.monotonic() < deadline, f"processes {left} outlive the benchmark"
        time.sleep(0.02)


def test_a_group_is_left_alone_after_close() -> None:
    code = """
    import signal, time
    from bench.child_processes import GroupEnd
    from tests.perf.child_processes import start_child
    child = start_child(["sleep", "600"], start_new_session=True)
    GroupEnd(child.pid, signal.SIGKILL).close()
    time.sleep(0.3)
    assert child.poll() is None
    child.kill()
    print(child.wait())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "-9", done.stderr


def test_benchmarks_start_no_process_that_could_outlive_them() -> None:
    programs = [path for path in Path(__file__).parent.rglob("*.py") if not path.name.startswith("test_")]
    assert len(programs) > 50
    starting = {path.name for path in programs if "subprocess.Popen(" in path.read_text()}
    assert starting == {"child_processes.py"}
