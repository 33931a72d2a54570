"""`make gpu-check`: everything that needs a GPU, in one run of at most 6 minutes (stage 1) or 10 (stage 2).

Items run in the order of what makes the rest worthless: facts, kernels against float64, models against the CPU, then
speed. gpu-check.json and gpu-check.md are written after each result, so that a run that is ended keeps what it has. An
item that fails does not end the run; what can't run is a row with the reason. Exit status 1: something failed. Without
a GPU: one line, and exit status 0.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.child import DEVICE_FAULT
from tests.gpu.rows import MARK, Row, line, write_files
from tests.perf.child_processes import start_child

ROOT = Path(__file__).parents[2]
LIMIT_S = {1: 360.0, 2: 600.0}
PATIENCE = 10  # times the limit of a group on the stand-in, whose kernels are interpreted


@dataclass(frozen=True)
class Group:
    """Items that run at the same time. lanes: those of a lane follow each other in one process."""

    lanes: tuple[tuple[str, ...], ...]
    limit_s: float


FUSED, GENERIC = (
    ("llama", "qwen3", "qwen2", "mistral", "smollm3"),
    ("gpt2", "gemma2", "gpt_oss", "deepseek_v3", "mixtral"),
)
KERNELS = (
    "norm and activation",
    "rotary and cache",
    "attention",
    "attention variants",
    "8-bit caches",
    "sampling",
    "products",
)
STAGES: dict[int, tuple[Group, ...]] = {
    1: (
        Group((("facts",),), 40),
        Group(tuple((f"kernels: {kind}",) for kind in KERNELS), 90),
        Group(tuple((f"parity: {one}", f"parity: {two}") for one, two in zip(FUSED, GENERIC, strict=True)), 100),
        Group((("load", "steps", "attention speed", "idle", "profile"),), 150),
        Group((("serve: 500/200, 64 at a time", "serve: 500/200, 256 at a time", "serve: 2048/128"),), 170),
        Group((("out of memory",), ("ranks",), ("KV blocks",)), 30),
        Group((("resources",),), 40),
    ),
    2: (
        Group((("facts",),), 40),
        Group((("serve: 500/2000", "serve: 6000/4000"),), 420),
        Group((("tiles",),), 90),
        Group((("sanitizer",),), 60),
    ),
}


class Check:
    """One run: starts the children and keeps the results."""

    def __init__(self, out: Path, stage: int, limit_s: float, stand_in: bool):
        self.rows: list[Row] = []
        self._out, self._stand_in = out, stand_in
        self._patience = PATIENCE if stand_in else 1
        self._ends = time.monotonic() + limit_s
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self.facts: dict[str, Any] = {"stage": stage, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        if stand_in:
            self.facts["stand-in"] = "no GPU: the items ran on the CPU, their times mean nothing"

    def run(self, groups: Sequence[Group]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for group in groups:
                limit = min(group.limit_s * self._patience, self._ends - time.monotonic())
                threads = [threading.Thread(target=self._run_lane, args=(lane, limit, folder)) for lane in group.lanes]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()

    def _run_lane(self, lane: Sequence[str], limit_s: float, folder: str) -> None:
        ends, left = time.monotonic() + limit_s, list(lane)
        while left and ends - time.monotonic() > 5:
            if not self._run_child(left, ends - time.monotonic(), folder):
                self._add(Row(left.pop(0), "error", None, "", "", False, "the process ended before the item did"))
        for item in left:
            self._add(Row(item, "skipped", None, note=f"no time left, {self._seconds():.0f} s after the start"))

    def _run_child(self, left: list[str], limit_s: float, folder: str) -> bool:
        """Run the items that are left, and remove those that ended. False: the first of the rest ended the process."""
        command = self.command(left, folder)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]]), "PYTHONUNBUFFERED": "1"}
        log = (self._out / "gpu-check.log").open("ab")
        with log, start_child(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log) as child:
            timer = threading.Timer(limit_s, child.kill)
            timer.start()
            assert child.stdout is not None
            for text in map(bytes.decode, child.stdout):
                if text.startswith(MARK):
                    row = Row(**json.loads(text.removeprefix(MARK)))
                    if row.measured == "end" and not row.name:
                        left.remove(row.item)
                    else:
                        self._add(row)
            timed_out = not timer.is_alive()
            timer.cancel()
        if timed_out and left:
            self._add(Row(left.pop(0), "error", None, "", "", False, f"not done after {limit_s:.0f} s"))
        return not left or timed_out or child.returncode == DEVICE_FAULT

    def command(self, items: Sequence[str], folder: str) -> list[str]:
        """The child that runs items, and writes their rows."""
        command = [sys.executable, "-m", "tests.gpu.child", "--folder", folder, *items]
        return command + ["--stand-in"] * self._stand_in

    def _add(self, row: Row) -> None:
        with self._lock:
            self.rows.append(row)
            if row.item == "facts" and row.name in ("card", "torch", "triton", "driver"):
                self.facts[row.name] = row.measured
            self.facts["seconds"] = round(self._seconds())
            write_files(self._out, self.facts, self.rows)
            print(f"{self._seconds():5.0f} s  {line(row)}", flush=True)

    def _seconds(self) -> float:
        return time.monotonic() - self._began


def gpu_or_reason() -> str:
    """Why there is no GPU to check; empty if there is one."""
    from engine.devices.cuda import find_gpus

    return find_gpus(1).error


def main(arguments: Sequence[str] | None = None, find: Callable[[], str] = gpu_or_reason) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description="Everything that needs a GPU.")
    parser.add_argument("--stage", type=int, choices=list(STAGES), default=1)
    parser.add_argument("--out", type=Path, default=Path("results/gpu-check"), help="folder of the results")
    parser.add_argument("--limit", type=float, help="seconds after which no item starts")
    parser.add_argument("--only", default="", help="run the items whose names contain this")
    parser.add_argument(
        "--stand-in", action="store_true", help="run the items on the CPU: shows their errors, no times"
    )
    options = parser.parse_args(arguments)
    if not options.stand_in and (reason := find()):
        print(f"gpu-check: no GPU to check ({reason})")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    groups = [
        Group(lanes, group.limit_s)
        for group in STAGES[options.stage]
        if (lanes := tuple(filter(None, (tuple(i for i in lane if options.only in i) for lane in group.lanes))))
    ]
    check = Check(options.out, options.stage, options.limit or LIMIT_S[options.stage], options.stand_in)
    check.run(groups)
    failed = sum(row.passed is False for row in check.rows)
    print(f"{len(check.rows)} results, {failed} failed: {options.out / 'gpu-check.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
