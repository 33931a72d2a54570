"""Engines as processes, for `make bench-cpu`: started, held still while others run, measured, and ended."""

import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil

from bench.child_processes import GroupEnd
from bench.loadgen import Recording, run_closed_loop, run_load
from bench.target import Target
from bench.target.server import free_port
from bench.workloads.base import RequestSpec
from tests.perf.child_processes import start_child

START_LIMIT_S = 900.0  # a first start may compile
RUN_LIMIT_S = 1200.0
_GRACE_S = (30.0, 10.0)  # after SIGINT, SIGTERM


class RequestsFailed(SystemExit):
    """Requests of an engine failed; it can take others. Ends a benchmark that doesn't catch it."""


class Engine:
    """An engine and its children in a process group of their own; between start and stop it runs or is paused."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], log: Path):
        self.name = name
        self.ready_s = 0.0  # from the start of the process to its first token
        self.versions: dict[str, str] = {}
        self._command = list(command)
        self._env = env
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._group_end: GroupEnd | None = None

    def start(self) -> None:
        began = time.monotonic()
        with self._log.open("ab") as log:
            self._process = start_child(
                self._command,
                stdin=subprocess.PIPE,
                stdout=self._stdout(log),
                stderr=log,
                env={**os.environ, **self._env},
                start_new_session=True,
            )
        self._group_end = GroupEnd(self._process.pid, signal.SIGKILL)
        try:
            self._await_first_token(began + START_LIMIT_S)
        except BaseException:
            self.stop()
            raise
        self.ready_s = time.monotonic() - began

    def _stdout(self, log: Any) -> Any:
        return log

    def _await_first_token(self, deadline: float) -> None:
        raise NotImplementedError

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.name} was not started"
        return self._process

    def fail(self, what: str, error: type[SystemExit] = SystemExit) -> NoReturn:
        text = self._log.read_text(errors="replace")[-3000:]
        raise error(f"{self.name}: {what}; the end of what it said:\n{text}")

    def pause(self) -> None:
        """Loaded, but without any use of the processor."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def pss_mb(self) -> float:
        """Memory of all its processes, pages shared with others by their share; MB of 10^6 bytes."""
        total = 0
        for process in self._tree():
            with suppress(FileNotFoundError, ProcessLookupError):
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                total += int(re.findall(r"^Pss:\s+(\d+) kB$", rollup, re.MULTILINE)[0])
        return total * 1024 / 1e6

    def idle_cpu_percent(self, seconds: float) -> float:
        """Of one core, while nothing is asked of it."""
        time.sleep(1.0)
        before, began = self._cpu_s(), time.monotonic()
        time.sleep(seconds)
        return 100 * (self._cpu_s() - before) / (time.monotonic() - began)

    def _cpu_s(self) -> float:
        used = 0
        for process in self._tree():
            for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                with suppress(FileNotFoundError, ProcessLookupError):
                    used += int(task.read_text().split()[0])
        return used / 1e9

    def stop(self) -> None:
        process = self._process
        if process is None:
            return
        try:
            for number, grace in zip((signal.SIGINT, signal.SIGTERM), _GRACE_S, strict=True):
                if process.poll() is None:
                    self._signal(signal.SIGCONT)
                    self._end(number)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(grace)
        finally:
            self._signal(signal.SIGKILL)
            process.wait()
            self._process = None
            if self._group_end is not None:
                self._group_end.close()

    def _end(self, number: int) -> None:
        self._signal(number)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)


class Child(Engine):
    """An engine's Python API, driven by cpu_child.py."""

    def _stdout(self, log: Any) -> Any:
        return subprocess.PIPE

    def _await_first_token(self, deadline: float) -> None:
        self.versions = self._answer(deadline)["ready"]

    def generate(self, specs: Sequence[RequestSpec], stream: bool = False) -> dict[str, float]:
        """What cpu_child.py answers; exits if tokens are missing."""
        output = specs[0].output_tokens
        asked = {"prompts": [list(spec.prompt_ids or ()) for spec in specs], "output": output, "stream": stream}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(asked).encode() + b"\n")
        self.process.stdin.flush()
        answer = self._answer(time.monotonic() + RUN_LIMIT_S)
        if answer["tokens"] != len(specs) * output:
            self.fail(f"{answer['tokens']} tokens instead of {len(specs) * output}", RequestsFailed)
        return answer

    def _answer(self, deadline: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                self.fail("no answer within the time limit")
            part = os.read(self.process.stdout.fileno(), 65536)
            if not part:
                self.fail("it ended")
            line += part
        found: dict[str, Any] = json.loads(line)
        return found

    def _end(self, number: int) -> None:
        """It ends with its input; signals are for when it doesn't."""
        stdin = self.process.stdin
        if stdin is not None and not stdin.closed:
            stdin.close()
        else:
            self._signal(number)


class Server(Engine):
    """An engine's HTTP server; "{port}" in the command stands for a free port."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], log: Path, model: str):
        port = str(free_port())
        super().__init__(name, [part.replace("{port}", port) for part in command], env, log)
        self.target = Target(f"http://127.0.0.1:{port}", model)

    def _await_first_token(self, deadline: float) -> None:
        asked = {"model": self.target.model, "prompt": [100 + i for i in range(16)], "max_tokens": 1, "temperature": 0}
        with httpx.Client(base_url=self.target.base_url, trust_env=False, timeout=120.0) as client:
            while True:
                if self.process.poll() is not None:
                    self.fail(f"it ended with exit code {self.process.returncode}")
                if time.monotonic() > deadline:
                    self.fail("it did not start within the time limit")
                with suppress(httpx.TransportError):
                    if client.get("/health").status_code == 200:
                        break
                time.sleep(0.05)
            answer = client.post("/v1/completions", json=asked)
        if answer.status_code != 200:
            self.fail(f"its first request was answered with {answer.status_code}: {answer.text[:300]}")

    def load(self, specs: list[RequestSpec], times: Any) -> Recording:
        """Requests at given times."""
        return self._whole(run_load(self.target, specs, times, observer=Watch(), time_limit_s=RUN_LIMIT_S), len(specs))

    def all_at_once(self, specs: list[RequestSpec]) -> Recording:
        observed = run_closed_loop(self.target, specs, len(specs), observer=Watch(), time_limit_s=RUN_LIMIT_S)
        return self._whole(observed, len(specs))

    def _whole(self, recording: Recording, requests: int) -> Recording:
        rows = recording.records((-1.0, float("inf")))
        bad = [row for row in rows if row.status != "ok" or row.output_tokens != row.asked_output_tokens]
        if bad or len(rows) != requests:
            first = f": {bad[0].status} {bad[0].error} after {bad[0].output_tokens} tokens" if bad else ""
            self.fail(f"{len(bad)} of {requests} requests failed or are short of tokens{first}", RequestsFailed)
        return recording


class Watch:
    """The load generator's observer: ends the run once a request has failed."""

    def tick(self, now_s: float, sent: int, first_token: int, finished: int, failed: int) -> bool:
        return not failed
