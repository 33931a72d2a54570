"""Limits of API keys, and requests that take too long."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.api.http_options import HttpOptions, Limits
from engine.api.key_limit import KeyLoads
from tests.engine.api.conftest import InLoop, in_loop

LONG = {"prompt": "ab", "max_tokens": 100, "ignore_eos": True}
USER = [{"role": "user", "content": "hi"}]
KEYS = HttpOptions(api_keys=("one", "two"), limits=Limits(max_requests_per_key=2))


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def counted(server: InLoop, name: str, **labels: str) -> float:
    text = (await server.http.get("/metrics")).text
    [family] = [one for one in text_string_to_metric_families(text) if one.name == name]
    return sum(one.value for one in family.samples if labels.items() <= one.labels.items())


async def test_a_key_has_so_many_requests_at_once_and_others_are_not_touched():
    async with in_loop(options=KEYS) as server:
        running = [
            asyncio.ensure_future(server.http.post("/v1/completions", json=LONG, headers=bearer("one")))
            for _ in range(2)
        ]
        while server.client.stats.live < 2:
            await asyncio.sleep(0)
        refused = await server.http.post("/v1/completions", json=LONG, headers=bearer("one"))
        assert refused.status_code == 429
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert "--max-requests-per-key" in refused.json()["error"]["message"]
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await server.http.get("/v1/models", headers=bearer("one"))).status_code == 200
        other = await server.http.post("/tokenize", json={"prompt": "a"}, headers=bearer("two"))
        assert other.status_code == 200
        assert [answer.status_code for answer in await asyncio.gather(*running)] == [200, 200]
        again = await server.http.post("/v1/completions", json=LONG, headers=bearer("one"))
        assert again.status_code == 200, "the first two have ended"
        assert await counted(server, "redline:requests_refused", limit="key_limit") == 1


async def test_a_stream_counts_until_its_end_and_a_refused_body_not_at_all():
    async with in_loop(options=KEYS) as server:
        for _ in range(5):
            answer = await server.http.post("/v1/completions", json={"max_tokens": 1}, headers=bearer("one"))
            assert answer.status_code == 400
            answer = await server.http.post("/v1/completions", json={**LONG, "stream": True}, headers=bearer("one"))
            assert answer.text.endswith("data: [DONE]\n\n")


def test_loads_are_those_of_all_processes():
    first = KeyLoads(2, 3)
    second = KeyLoads(2, 3, first.descriptor)
    assert [first.admit(0, 1, 3), first.admit(0, 1, 3), second.admit(1, 1, 3)] == [True] * 3
    assert not second.admit(1, 1, 3)
    assert second.admit(1, 2, 3), "another key"
    assert [first.total(key) for key in range(3)] == [0, 3, 1]
    first.leave(0, 1)
    first.clear(1)
    assert [second.total(key) for key in range(3)] == [0, 1, 0]


ADMITTING = """
import sys
from engine.api.key_limit import KeyLoads
loads, process = KeyLoads(2, 1, int(sys.argv[1])), int(sys.argv[2])
print("up", flush=True)
sys.stdin.readline()
admitted = 0
for _ in range(20_000):
    if loads.admit(process, 0, 1):
        assert loads.total(0) == 1, "both processes were admitted"
        loads.leave(process, 0)
        admitted += 1
print(admitted)
"""


def test_processes_that_admit_at_once_do_not_exceed_the_limit():
    loads = KeyLoads(2, 1)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", ADMITTING, str(loads.descriptor), str(process)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(loads.descriptor,),
        )
        for process in range(2)
    ]
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "up\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in both:
        admitted, _ = one.communicate(timeout=120)
        assert one.returncode == 0
        assert int(admitted) > 0
    assert loads.total(0) == 0


class Held:
    """A core that gets no turn for a while."""

    def __init__(self, server: InLoop, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(server.core, "step", lambda _now: None)
        monkeypatch.setattr(type(server.core), "has_work", property(lambda _self: False))


@pytest.fixture
async def hurried(monkeypatch: pytest.MonkeyPatch) -> Any:
    async with in_loop(options=HttpOptions(limits=Limits(request_timeout=0.05))) as server:
        Held(server, monkeypatch)
        yield server


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_request_that_takes_too_long_ends_with_the_cause(hurried: InLoop, path: str):
    body = {"max_tokens": 3} | ({"prompt": "a"} if "chat" not in path else {"messages": [{"role": "user"}]})
    if "chat" in path:
        body["messages"] = [{"role": "user", "content": "hi"}]
    answer = await hurried.http.post(path, json=body)
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == ("request_timeout", "server_error")
    assert "0.05 s" in error["message"]
    assert "--request-timeout" in error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert hurried.client.stats.live == 0, "its slot is free"
    assert hurried.client.stats.finished == {"abort": 1}
    assert await counted(hurried, "redline:request_timeouts") == 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", LONG),
        ("/v1/chat/completions", {"messages": USER}),
        ("/v1/responses", {"input": "hi"}),
        ("/v1/messages", {"messages": USER, "max_tokens": 9}),
    ],
)
async def test_a_stream_that_takes_too_long_ends_with_the_error_of_its_api(
    hurried: InLoop, path: str, fields: dict[str, Any]
):
    answer = await hurried.http.post(path, json={**fields, "stream": True})
    assert answer.status_code == 200, "its head was sent"
    last = answer.text.removesuffix("\n\n").split("\n\n")[-1]
    name, _, data = last.rpartition("data: ")
    found = json.loads(data)
    if path == "/v1/messages":
        assert name == "event: error\n"
        error = found["error"]
        assert (found["type"], error["type"]) == ("error", "timeout_error")
    elif path == "/v1/responses":
        assert name == "event: response.failed\n"
        error = found["response"]["error"]
        assert error["code"] == "server_error"
    else:
        error = found["error"]
        assert (name, error["code"]) == ("", "request_timeout")
    assert "--request-timeout" in error["message"]
    assert hurried.client.stats.live == 0


async def test_requests_in_time_are_not_touched():
    async with in_loop(options=HttpOptions(limits=Limits(request_timeout=60))) as server:
        assert (await server.post("/v1/completions", **LONG))["usage"]["completion_tokens"] == 100
        answer = await server.http.post("/v1/completions", json={**LONG, "stream": True})
        assert answer.text.endswith("data: [DONE]\n\n")
        assert (await server.http.get("/health")).status_code == 200
        assert await counted(server, "redline:request_timeouts") == 0


async def test_a_full_queue_is_counted():
    async with in_loop(options=HttpOptions(limits=Limits(max_queue=0)), max_num_seqs=1) as server:
        answers = await asyncio.gather(*(server.http.post("/v1/completions", json=LONG) for _ in range(3)))
        refused = sum(answer.status_code == 503 for answer in answers)
        assert refused == 2
        assert await counted(server, "redline:requests_refused", limit="queue_full") == refused
