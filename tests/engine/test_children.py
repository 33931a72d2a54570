"""The end of a child process."""

import subprocess
import sys

import pytest

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
