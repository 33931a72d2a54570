"""A disk that is full while `redline bench` writes its results."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.perf.faults.row import Row, world

DISK_KB = 84  # room for what is tried before measuring, and for the first points


def full_disk(model: str) -> Row | None:
    """Measure onto a file system that is full after the first files; None where this system can't make one."""
    if shutil.which("unshare") is None:
        print("disk full: skipped, it needs unshare(1) to mount a small file system")
        return None
    with world(model) as here, tempfile.TemporaryDirectory(prefix="faults-") as name:
        base = Path(name)
        (base / "disk").mkdir()
        bench = [
            sys.executable, "-m", "cli.main", "bench", "--url", here.served.url, "--input", "16", "--output", "16",
            "--rates", "4,8,12,16,20,24", "--window", "2", "--max-minutes", "2", "--out", str(base / "disk" / "run"),
        ]  # fmt: skip
        # A file system of so many KB, seen by the bench alone; what lies on it at the end is listed.
        script = (
            f'mount -t tmpfs -o size={DISK_KB}k tmpfs "{base}/disk"; "$@"; code=$?; '
            f'find "{base}/disk" -name "*.part*" > "{base}/parts"; exit $code'
        )
        before, begin = len(psutil.Process().children(recursive=True)), time.monotonic()
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", script, "sh", *bench],
            check=False, capture_output=True, text=True, timeout=180, env={**os.environ, "COLUMNS": "160"},
        )  # fmt: skip
        if "unshare" in done.stderr and "failed" in done.stderr:
            print(f"disk full: skipped, this system doesn't let us mount a file system: {done.stderr.strip()}")
            return None
        lines = done.stderr.strip().splitlines()
        row = Row("disk full for results", lines[-1] if lines else "", time.monotonic() - begin, {})
        row.expect("Traceback" not in done.stderr, "a traceback")
        row.expect("No space left on device" in done.stderr, "the cause isn't named")
        row.expect("16/16" in done.stdout, "the figures aren't on the screen")
        row.expect(done.returncode not in (0, -9), f"exit code {done.returncode}")
        row.leaked = {
            "processes": max(0, len(psutil.Process().children(recursive=True)) - before),
            "parts": len((base / "parts").read_text().splitlines()),
        }
        return row
