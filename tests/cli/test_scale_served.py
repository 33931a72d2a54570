"""Replicas under load: killed ones are started again, `redline scale` adds and drains them; nothing else is lost."""

import random
from pathlib import Path

import httpx
import pytest

from cli.main import main
from tests.docs.blocks import BLOCKS
from tests.perf.bench_replicas import health_of, run_part, scale, settle
from tests.perf.replica_load import Kill, Load, kill_replicas, serving
from tests.serving import Served, serve

DUMMY = ("--load-format", "dummy", "--max-model-len", "2K", "--max-num-seqs", "8", "--disable-log-requests")
TOKENS = 400


def test_only_what_ran_on_a_killed_replica_fails(model: str):
    async def kill(served: Served, _load: Load) -> list[Kill]:
        return await kill_replicas(health_of(served), 1.0, 2, random.Random(2))

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
