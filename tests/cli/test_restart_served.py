"""`redline serve --restart-on-failure`: an engine that ended by itself is started again, with JSON logs of it all."""

import json
import os
import re
import signal
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.cli.test_serve import DUMMY, assert_gone, children
from tests.serving import Served, serve

BODY: dict[str, Any] = {"prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
LONG = {**BODY, "max_tokens": 1500, "stream": True}


def kill_core(server: Served) -> int:
    [core] = [process for process in children(server.process) if "engine.launch" in process.cmdline()]
    os.kill(core.pid, signal.SIGKILL)
    return core.pid


def lines(server: Served) -> list[dict[str, Any]]:
    """The log, of which each line is a JSON object."""
    found = [json.loads(line) for line in server.output().splitlines() if not line.startswith("redline: error")]
    assert all({"time", "level", "logger", "process", "message"} <= set(line) for line in found)
    return found


def check_ledger(started: float, line: dict[str, Any]) -> None:
    """The phases of the start sum to the time from the start of the process, in seconds since 1970, to the line."""
    total, *parts = map(float, re.findall(r"(\d+\.\d\d) s", line["message"]))
    assert sum(parts) == pytest.approx(total, abs=0.01 * len(parts))
    wall = datetime.fromisoformat(line["time"]).timestamp() - started
    assert total == pytest.approx(wall, abs=1.5), "the system has the start of a process in whole seconds"
    assert "import torch" in line["message"]
    assert float(re.search(r"other (\S+) s", line["message"])[1]) < 0.1 * total  # type: ignore[index]


def test_a_killed_engine_is_started_again_until_it_was_killed_too_often(model: str, tmp_path: Path):
    flags = (*DUMMY, "--restart-on-failure", "1", "--api-servers", "2", "--log-format", "json", "--max-model-len", "4K")
    with serve(tmp_path, model, *flags) as server:
        before = server.post("/v1/completions", **BODY)["choices"][0]["text"]
        events: list[str] = []
        started = psutil.Process(server.process.pid).create_time()
        begun = threading.Event()

        def read() -> None:
            with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
                for line in answer.iter_lines():
                    events.append(line)
                    begun.set()

        reading = threading.Thread(target=read)
        reading.start()
        assert begun.wait(60)
        killed = kill_core(server)
        reading.join(60)
        last = [line for line in events if line][-1]
        assert f"the EngineCore (process {killed}) was killed by SIGKILL" in last, "its requests fail with the cause"
        assert "it is restarted (--restart-on-failure)" in last
        while (health := httpx.get(f"{server.url}/health", timeout=60)).status_code == 200:
            time.sleep(0.01)  # the other process learns of it a moment later
        assert (health.status_code, health.json()["status"]) == (503, "restarting")
        held = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=120)
        assert (held.status_code, held.json()["choices"][0]["text"]) == (200, before), "it waits for the new engine"
        deadline = time.monotonic() + 120
        for _ in range(12):  # whichever process answers
            while httpx.get(f"{server.url}/ready", timeout=60).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == before
        assert server.metric("redline:core_restarts_total") == 1
        family = children(server.process)
        again = kill_core(server)
        assert server.process.wait(30) == 1
        assert_gone(family)
        last = server.output().splitlines()[-1]
        assert f"(process {again}) was killed by SIGKILL" in last
        assert "it ended 2 times within 600 s and is not restarted" in last
        log = lines(server)
        assert any("serves again" in line["message"] for line in log)
        [start] = [line for line in log if line["message"].startswith("serving ")]
        assert start["settings"]["dtype"] == "float32"
        check_ledger(started, next(line for line in log if line["message"].startswith("started in ")))
        ended = [line["request"] for line in log if line["logger"] == "redline.request"]
        assert {one["finish_reason"] for one in ended} >= {"length", "error"}
