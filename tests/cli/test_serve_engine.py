"""`redline serve` with the V0 baseline, its parts taken from V1, the log, and the watchdog."""

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.config import ABLATIONS
from tests.cli.test_serve import DUMMY, assert_gone, assert_one_line, children, run
from tests.serving import Served, serve

BODY = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def v0(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = (*DUMMY, "--engine", "v0", "--num-scheduler-steps", "4", "--served-model-name", "tiny")
    with serve(tmp_path_factory.mktemp("log"), model, *flags, "--disable-log-requests") as running:
        yield running


@pytest.fixture(scope="module")
def v1(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = (*DUMMY, "--scheduling-policy", "priority", "--served-model-name", "tiny")
    with serve(tmp_path_factory.mktemp("log"), model, *flags) as running:
        yield running


def wait_for(condition: Any, what: str, seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def test_the_start_table_of_v0_says_what_it_emulates(v0: Served):
    shown = v0.output()
    for words in ("V0 (emulated)", "whole prompts", "token budget", "4 steps per run", "prefix caching           off"):
        assert words in shown
    for name, what in ABLATIONS.items():
        found = re.search(rf"{name} +{re.escape(what)}", shown)
        assert bool(found) == (name != "driver-broadcast"), f"{name}, with one rank"
    assert re.search(r"watermark .*\(\d+ of [\d,]+\)", shown)


def test_v1_has_no_such_lines(v1: Served):
    assert "V0" not in v1.output()
    assert not any(name in v1.output() for name in ABLATIONS)


def test_v0_chunked_and_ablations_say_so_and_answer_as_v1_does(model: str, v1: Served, v0: Served, tmp_path: Path):
    expected = v1.post("/v1/completions", **BODY)["choices"]
    assert v0.post("/v1/completions", **BODY)["choices"] == expected
    with serve(tmp_path, model, *DUMMY, "--engine", "v0", "--enable-chunked-prefill") as chunked:
        assert "prompts in chunks" in chunked.output()
        assert "no-chunking" not in chunked.output()
        assert chunked.post("/v1/completions", **BODY)["choices"] == expected
    flags = ("--ablate", "inline_frontend,watermark", "--ablate", "full-state")
    with serve(tmp_path, model, *DUMMY, *flags) as ablated:
        assert "V1, without:" in ablated.output()
        for name in ABLATIONS:
            assert (name in ablated.output()) == (name in ("inline-frontend", "watermark", "full-state")), name
        assert ablated.post("/v1/completions", **BODY)["choices"] == expected
        long = httpx.post(f"{ablated.url}/v1/completions", json={"prompt": "a" * 5000}, timeout=60)
        assert long.status_code == 400
        assert "--max-model-len" in long.json()["error"]["message"]


def test_priority_is_taken_or_refused(v0: Served, v1: Served):
    assert v1.post("/v1/completions", **BODY, priority=5)["choices"]
    refused = v0.client.post("/v1/completions", json={**BODY, "priority": 5})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "priority"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--engine", "v1", "--num-scheduler-steps", "4"), ["--num-scheduler-steps", "--engine v0"]),
        (("--engine", "v1", "--enable-chunked-prefill"), ["--enable-chunked-prefill", "--engine v0"]),
        (("--engine", "v0", "--num-scheduler-steps", "4", "--enable-chunked-prefill"), ["exclude each other"]),
        (("--engine", "v0", "--ablate", "watermark"), ["--ablate", "--engine v0"]),
        (("--ablate", "chunking"), ["--ablate", "no-chunking", "'chunking'"]),
        (("--engine", "v2"), ["--engine", "v2"]),
        (("--scheduling-policy", "newest"), ["--scheduling-policy", "newest"]),
        (("--api-servers", "0"), ["--api-servers"]),
        (("--step-timeout", "-1"), ["--step-timeout"]),
    ],
)
def test_flags_that_cannot_hold_say_so_in_one_line(model: str, flags: tuple[str, ...], said: list[str]):
    assert_one_line(run(model, *flags), 2, *said)


def test_requests_are_logged_unless_told_otherwise(v0: Served, v1: Served):
    ids = [server.post("/v1/completions", **BODY)["id"] for server in (v0, v1)]
    wait_for(lambda: ids[1] in v1.output(), "the request's line is missing")
    assert ids[0] not in v0.output()


def test_figures_are_logged_while_there_is_traffic(v0: Served):
    v0.post("/v1/completions", **BODY)
    line = wait_for(lambda: re.findall(r"redline\.stats: (prompt .*)", v0.output()), "no line of figures", 25)[-1]
    assert re.fullmatch(
        r"prompt [\d.]+ tok/s, generation [\d.]+ tok/s, running \d+, waiting \d+, KV cache [\d.]+ %, "
        r"prefix hits (-|[\d.]+ %), preemptions \d+",
        line,
    )


def ranks_of(server: Served) -> list[psutil.Process]:
    return [child for child in children(server.process) if "engine.worker.rank" in child.cmdline()]


def test_a_step_that_hangs_is_named_and_may_come_back_or_end_the_server(model: str, tmp_path: Path):
    with serve(tmp_path, model, *DUMMY, "--tp", "2", "--step-timeout", "1") as server:
        rank = ranks_of(server)[1]
        server.post("/v1/completions", **BODY)
        rank.send_signal(signal.SIGSTOP)
        body = {**BODY, "max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            hung = wait_for(lambda: ask_health(server, 503), "/health doesn't tell")
            assert hung["status"] == "hung"
            assert f"rank 1 (process {rank.pid}, stopped) hangs in the forward phase of step" in hung["cause"]
            assert hung["last_step_age_s"] >= 1
            rank.send_signal(signal.SIGCONT)
            *_, done = (line for line in answer.iter_lines() if line)
        assert done == "data: [DONE]"
        wait_for(lambda: ask_health(server, 200), "/health doesn't recover")
        shown = server.output()
        assert hung["cause"] in shown
        assert "returned: the engine continues" in shown
        for words in ("most recent call first", "core/server.py", "worker/rank.py"):
            assert words in shown, "stacks of the core and of its ranks"
        family = children(server.process)
        rank.send_signal(signal.SIGSTOP)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            events = [line for line in answer.iter_lines() if line]
        assert "hangs in the forward phase" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
        assert server.process.wait(30) == 1
        last = server.output().splitlines()[-1]
        assert last.startswith(f"redline: error: rank 1 (process {rank.pid}, stopped) hangs in the forward phase of")
        assert_gone(family)


def ask_health(server: Served, status: int) -> dict[str, Any] | None:
    answer = server.client.get("/health")
    body: dict[str, Any] = answer.json()
    return body if answer.status_code == status else None
