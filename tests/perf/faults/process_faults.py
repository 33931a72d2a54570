"""Processes that are killed or told to end, and a port that is taken."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial

import psutil

from tests.perf.faults.clients import Streams, ask, most_seen, slow_reader
from tests.perf.faults.held import Held, shared_memory
from tests.perf.faults.row import DUMMY, Row, World, world
from tests.serving import serve

SHUTDOWN_S = 3
STREAMS = 4
ANSWER_S = 30.0  # how long the server may take to be whole again


def sigterm(model: str) -> Row:
    """SIGTERM while clients stream, one of which doesn't read."""
    with world(model, "--shutdown-timeout", str(SHUTDOWN_S)) as here:
        streams = Streams(here.served, STREAMS, max_tokens=4000)
        silent = slow_reader(here.served)
        time.sleep(0.5)
        begin = time.monotonic()
        here.served.process.send_signal(signal.SIGTERM)
        seen = streams.wait()
        code = here.served.process.wait(60)
        row = Row("SIGTERM under load with a slow reader", most_seen(seen), time.monotonic() - begin, {})
        row.leaked = here.left_behind()
        silent.close()
        row.expect(row.seconds < SHUTDOWN_S + 4, f"--shutdown-timeout is {SHUTDOWN_S} s")
        row.expect(all(what == "[DONE]" or what.startswith("error event: ") for what in seen), "a stream broke off")
        row.expect(code == 0, f"exit code {code}")
        return row


def victim(here: World, module: str) -> psutil.Process:
    """The first process of a server that runs a module."""
    return next(one for one in here.processes if module in one.cmdline())


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)


def killed_core(model: str, fault: str, flags: tuple[str, ...]) -> Row:
    """The core, or a rank of it, is killed: clients and the last line name it."""
    with world(model, *flags) as here:
        streams = Streams(here.served, STREAMS)
        target = victim(here, "engine.worker.rank" if flags else "engine.launch")
        begin = time.monotonic()
        kill(target)
        seen = streams.wait()
        code = here.served.process.wait(30)
        row = Row(fault, most_seen(seen), time.monotonic() - begin, here.left_behind())
        cause = f"(process {target.pid}) was killed by SIGKILL"
        row.expect(all(cause in what for what in seen), "clients lack the cause")
        row.expect(code == 1 and cause in here.last_line(), f"exit code {code}, last line {here.last_line()!r}")
        return row


def killed_api_process(model: str) -> Row:
    """An API process is killed: it is started again, and the streams of the other one go on."""
    with world(model, "--api-servers", "2") as here:
        for _ in range(8):
            ask(here.served)
        here.warm()
        streams = Streams(here.served, 16, max_tokens=1200)
        target = victim(here, "engine.api.process")
        begin = time.monotonic()
        kill(target)
        while not restarted(here, target) and time.monotonic() - begin < ANSWER_S:
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        seen = streams.wait()
        row = Row("kill -9 of an API process", most_seen(seen), seconds, {})
        row.expect(restarted(here, target), "it was not started again")
        row.expect("[DONE]" in seen, "no stream of the other process went on")
        answers = {ask(here.served) for _ in range(20)}
        row.expect(answers == {"200"}, f"afterwards clients saw {sorted(answers)}")
        row.leaked = here.leaked()
        return row


def restarted(here: World, old: psutil.Process) -> bool:
    for child in psutil.Process(here.served.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it ends just now
            if "engine.api.process" in child.cmdline() and child.pid != old.pid:
                return True
    return False


def killed_replica(model: str) -> Row:
    """One of two replicas is killed: the other serves on."""
    with world(model, "--dp", "2") as here:
        for _ in range(8):
            ask(here.served)
        here.warm()
        streams = Streams(here.served, 8)
        target = victim(here, "engine.launch")
        begin = time.monotonic()
        kill(target)
        cause = f"(process {target.pid}) was killed by SIGKILL"
        while not any(cause in what for what in list(streams.seen)) and time.monotonic() - begin < ANSWER_S:
            time.sleep(0.01)
        seconds = time.monotonic() - begin  # until clients know: the other replica's streams take as long as they take
        seen = streams.wait()
        row = Row("kill -9 of a replica", most_seen(seen), seconds, {})
        row.expect(any(cause in what for what in seen), "clients lack the cause")
        row.expect(all(what == "[DONE]" or cause in what for what in seen), "a stream broke off")
        row.expect("[DONE]" in seen, "no stream of the other replica went on")
        answers = {ask(here.served) for _ in range(8)}
        row.expect(answers == {"200"}, f"afterwards clients saw {sorted(answers)}")
        row.leaked = here.leaked()
        return row


def killed_first_process(model: str) -> Row:
    """The process that was started is killed: none outlives it, and the next start clears what it left."""
    with world(model, "--api-servers", "2") as here:
        streams = Streams(here.served, STREAMS)
        begin = time.monotonic()
        here.served.process.kill()
        here.served.process.wait(10)
        seen = streams.wait()
        _, alive = psutil.wait_procs(here.processes, timeout=10)
        row = Row("kill -9 of the first process", most_seen(seen), time.monotonic() - begin, {})
        with serve(here.faults, model, *DUMMY, env={"TMPDIR": str(here.folder)}) as again:
            row.expect(ask(again) == "200", "the next server doesn't answer")
        row.leaked = asdict(Held(processes=len(alive), shared_memory=shared_memory(here.folder)))
        return row


def port_taken(model: str) -> Row:
    """A second server on the same port is refused before it loads a model."""
    with world(model) as here:
        ask(here.served)
        here.warm()
        begin = time.monotonic()
        again = run_serve(model, here, *DUMMY, "--port", here.served.url.rpartition(":")[2])
        row = Row("port taken", again.stderr.strip(), time.monotonic() - begin, here.leaked())
        row.expect(again.returncode == 1 and again.stderr.count("\n") == 1, f"exit code {again.returncode}")
        row.expect("is in use" in again.stderr and "--port" in again.stderr, "the line doesn't name the cause")
        row.expect("weights" not in again.stdout, "it loaded a model first")
        return row


def run_serve(model: str, here: World, *flags: str) -> "subprocess.CompletedProcess[str]":
    """A second `redline serve` with the same temporary folder."""
    command = [sys.executable, "-m", "cli.main", "serve", model, *flags]
    env = {**os.environ, "TMPDIR": str(here.folder)}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=env)


PROCESS_FAULTS: Sequence[Callable[[str], Row]] = (
    sigterm,
    partial(killed_core, fault="kill -9 of the core", flags=()),
    partial(killed_core, fault="kill -9 of a rank", flags=("--tp", "2")),
    killed_api_process,
    killed_replica,
    killed_first_process,
    port_taken,
)
