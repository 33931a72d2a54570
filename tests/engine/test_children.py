"""The end of a child process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.children import process_state

ROOT = Path(__file__).parents[2]

CHILD = """
import atexit, threading
from engine import children

atexit.register(print, "cleaned up")
if {code}:  # a thread that never ends, which the interpreter would wait for
    threading.Thread(target=threading.Event().wait).start()
print("reported")
children.end_process({code})
"""


@pytest.mark.parametrize(("code", "written"), [(0, ["reported", "cleaned up"]), (3, ["reported"])])
def test_a_failed_process_waits_for_no_thread(code: int, written: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD.format(code=code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (ended.returncode, ended.stdout.split("\n")[:-1]) == (code, written), ended.stderr


WATCHING = """
import sys, threading
import msgspec
from engine import children

class Options(msgspec.Struct):
    pass

if __name__ == "__main__":
    assert children.read_options(Options) is not None
    children.end_with_parent()
    print("up", flush=True)
    threading.Event().wait()
"""
PARENT = """
import os, signal, time
from engine import children
from watching import Options

child = children.spawn("watching", Options())
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="F_SETSIG is Linux's")
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_child_ends_with_a_killed_parent(stopped: bool, tmp_path: Path) -> None:
    (tmp_path / "watching.py").write_text(WATCHING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    with subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        said = {parent.stdout.readline().strip() for _ in range(2)}
        (pid,) = (int(word) for word in said - {"up"})
        if stopped:
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda: process_state(pid) == "T", "the child does not stop")
        parent.kill()
        parent.wait()
    wait_for(lambda: process_state(pid) in ("", "Z"), "the child outlives its parent")


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)
