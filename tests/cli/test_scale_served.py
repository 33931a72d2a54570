"""Replicas under load: killed ones are started again, `redline scale` adds and drains them; nothing else is lost."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cli.main import main
from tests.docs.blocks import BLOCKS
from tests.perf.bench_replicas import health_of, run_part, scale, settle
from tests.perf.replica_load import Kill, Load, kill_replicas, serving
from tests.serving import Served, serve

DUMMY = ("--load-format", "dummy", "--max-model-len", "2K", "--max-num-seqs", "8", "--disable-log-requests")
TOKENS = 400
# Its requests run until they are ended: a token takes milliseconds.
SIMULATED = ("--device", "sim:h100", "--max-model-len", "64K", "--max-num-seqs", "8", "--disable-log-requests")
LLAMA_8B = "meta-llama/Meta-Llama-3.1-8B-Instruct"
WAIT_S = 60.0


def test_only_what_ran_on_a_killed_replica_fails(model: str):
    async def kill(served: Served, load: Load) -> list[Kill]:
        kills = await kill_replicas(health_of(served), 1.0, 2, random.Random(2))
        while all(one.error for one in load.asked):  # on a slow machine none may have ended before
            await asyncio.sleep(0.1)
        return kills

    flags = (*DUMMY, "--dp", "2", "--api-servers", "2", "--restart-on-failure", "10")
    row, wrong = run_part("kill", model, flags, 4, TOKENS, 2, kill)
    assert not wrong
    assert row["kills"] == row["restarts"] == 2
    assert row["requests"] > row["failed"]


def test_no_request_is_lost_while_replicas_are_added_and_drained(model: str):
    seen: list[int] = []

    async def up_and_down(served: Served, _load: Load) -> list[Kill]:
        [documented] = [one for one in BLOCKS if one.page == "docs/serving/index.md" and "redline scale" in one.text]
        assert documented.commands == ["redline scale http://localhost:8000 --dp 3"]
        for replicas in (3, 1):
            assert f"{replicas} replica" in await scale(served.url, replicas)
            await settle(served, replicas)
            seen.append(len(serving(health_of(served)())))
        return []

    row, wrong = run_part("scale", model, (*DUMMY, "--api-servers", "2"), 4, TOKENS, 1, up_and_down)
    assert not wrong
    assert (row["failed"], seen) == (0, [3, 1])
    assert row["requests"] >= 4


def test_what_can_not_be_done_is_refused_and_the_server_goes_on(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    with serve(tmp_path, model, *DUMMY, "--api-key", "secret") as server:
        server.client.headers["Authorization"] = "Bearer secret"
        assert main(["scale", server.url, "--dp", "2"]) == 1
        assert "an API key is required" in capsys.readouterr().err
        for value, message in ((0, ">= 1"), (1000, "<= 64"), ("two", "int")):
            answer = server.client.post("/scale", json={"data_parallel_size": value})
            assert answer.status_code == 400
            assert message in answer.json()["error"]["message"]
            assert answer.json()["error"]["param"] == "data_parallel_size"
        answer = server.client.post("/scale", json={"data_parallel_size": 2, "replicas": 3})
        assert (answer.status_code, "replicas is not supported here" in answer.text) == (400, True)
        assert main(["scale", server.url, "--dp", "2", "--api-key", "wrong"]) == 1
        assert "the API key is not one of this server's" in capsys.readouterr().err
        monkeypatch.setenv("REDLINE_API_KEY", "secret")
        assert main(["scale", server.url, "--dp", "1"]) == 0
        assert capsys.readouterr().out == "1 replica serves\n"
        assert main(["scale", server.url.replace("http:", "https:"), "--dp", "2"]) == 1
        assert "does not answer: it does not use TLS: use http:// in place of https://" in capsys.readouterr().err
        state = server.client.get("/scale").json()
        assert (state["done"], state["data_parallel_size"], state["error"]) == (True, 1, None)
    assert main(["scale", server.url.replace("//", "//me:password@"), "--dp", "2"]) == 1
    assert f"{server.url} does not answer" in (said := capsys.readouterr().err)
    assert "password" not in said
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url)


def api_process(server: Served) -> psutil.Process:
    """The further API process."""
    deadline = time.monotonic() + WAIT_S
    while True:
        for child in psutil.Process(server.process.pid).children():
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "engine.api.process" in child.cmdline():
                    return child
        assert time.monotonic() < deadline, "no API process is started again"
        time.sleep(0.1)


def client_of(server: Served, process: int) -> httpx.Client:
    """A client whose connection one API process has."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        client = httpx.Client(base_url=server.url, timeout=WAIT_S)
        with client.stream("GET", "/version") as answer:
            port = answer.extensions["network_stream"].get_extra_info("client_addr")[1]
            answer.read()
        if any(one.raddr and one.raddr.port == port for one in psutil.Process(process).net_connections()):
            return client
        client.close()
        time.sleep(0.05)
    raise AssertionError(f"process {process} gets no connection")


class Stream:
    """An answer that goes on until it is ended, read on a thread."""

    def __init__(self, client: httpx.Client):
        self.client = client
        self.error = ""
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        assert self._begun.wait(WAIT_S)

    def _read(self) -> None:
        body = {"prompt": "a", "max_tokens": 60_000, "ignore_eos": True, "stream": True}
        with (
            contextlib.suppress(httpx.TransportError),  # the server is killed
            self.client.stream("POST", "/v1/completions", json=body) as answer,
        ):
            for line in answer.iter_lines():
                self._begun.set()
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    self.error = event.get("error", {}).get("message", "")
                if self.error:
                    return

    def wait(self) -> None:
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()


def statuses(client: httpx.Client) -> list[str]:
    state: dict[str, Any] = client.get("/scale").json()
    found = [one["status"] for one in state["replicas"]]
    assert state["done"] == (not {"starting", "draining"} & set(found))
    assert [one["status"] for one in client.get("/health").json().get("replicas", [])] == found
    return found


def wait_for(client: httpx.Client, expected: list[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while statuses(client) != expected:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begin_scale(server: Served, *flags: str) -> "subprocess.Popen[str]":
    """A command that drains, and waits."""
    command = [sys.executable, "-m", "cli.main", "scale", server.url, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "1 draining" in process.stderr.readline()
    return process


def test_drains_that_are_left_replaced_canceled_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serve(tmp_path, LLAMA_8B, *SIMULATED, "--dp", "2", "--api-servers", "2") as server:
        first = client_of(server, server.process.pid)
        streams = [Stream(client_of(server, server.process.pid)) for _ in range(2)]
        try:
            left = begin_scale(server, "--dp", "1")
            left.send_signal(2)
            output = left.communicate(timeout=WAIT_S)[1]
            assert left.returncode == 130
            assert f"the change goes on; to wait for it again: redline scale {server.url} --dp 1" in output

            killed = api_process(server)
            killed.kill()
            killed.wait(WAIT_S)
            again = client_of(server, api_process(server).pid)
            assert statuses(again) == statuses(first) == ["ok", "draining"], "a process that begins knows of the drain"

            replaced = begin_scale(server, "--dp", "1")
            assert first.post("/scale", json={"data_parallel_size": 2}).json()["done"], "it is taken back"
            output = replaced.communicate(timeout=WAIT_S)[1]
            assert replaced.returncode == 1
            assert "another command has changed the number of replicas: replicas: 2 wanted; 2 ok" in output
            wait_for(again, ["ok", "ok"])

            assert main(["scale", server.url, "--dp", "1", "--drain-timeout", "0.1"]) == 0
            assert "1 output ended with an error (--drain-timeout)" in capsys.readouterr().err
            wait_for(again, ["ok"])
            assert server.metric("redline:drain_timeouts_total") == 1
            ended = next(stream for stream in streams if stream.error)
            ended.wait()
            assert "replica 1 was removed, and this request was not done within 0.1 s" in ended.error
            assert "(redline scale --drain-timeout)" in ended.error
            assert server.client.get("/load").json() == {"server_load": 1}, "the other one goes on"
        finally:
            server.process.kill()
            for stream in streams:
                stream.wait()
