"""`redline serve --dp 2`: both answer, one that dies takes only its own with it, the last ends the server."""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from redline import LLM, SamplingParams
from tests.cli.test_serve import DUMMY, assert_gone, assert_one_line, children, run
from tests.serving import Served, serve

pytestmark = pytest.mark.usefixtures("forked_children")

TOKENS = 1500  # of an answer that is still under way when its replica dies
BODY: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
LONG = {**BODY, "max_tokens": TOKENS, "stream": True}
PROMPTS = [f"{number} is a prompt" for number in range(4)]


@pytest.fixture(scope="module")
def alone(model: str) -> Iterator[dict[str, list[int]]]:
    """What one replica answers."""
    with LLM(model, load_format="dummy", max_model_len=4096) as llm:
        params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        yield {answer.prompt or "": answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, params)}


def ask(server: Served, prompt: str) -> list[int]:
    """A connection each, so that any API process may answer."""
    answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": prompt}, timeout=60)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def placed(server: Served) -> Counter[int]:
    """Requests that ended, by replica."""
    found = re.findall(r"redline\.request: (\{.*\})$", server.output(), re.MULTILINE)
    return Counter(json.loads(line)["replica"] for line in found)


class Streams:
    """A stream a prompt, each on a thread, told when its first token is there."""

    def __init__(self, server: Served, prompts: list[str]):
        self.events: dict[str, list[str]] = {prompt: [] for prompt in prompts}
        self._begun = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._read, args=(server, prompt)) for prompt in prompts]
        for thread in self._threads:
            thread.start()
        for _ in prompts:
            assert self._begun.acquire(timeout=60)

    def _read(self, server: Served, prompt: str) -> None:
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "prompt": prompt}, timeout=60) as found:
            for line in found.iter_lines():
                if line:
                    self.events[prompt].append(line.removeprefix("data: "))
                if len(self.events[prompt]) == 1 and line:
                    self._begun.release()

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(60)

    def tokens(self, prompt: str) -> list[int]:
        chunks = [json.loads(event) for event in self.events[prompt] if event != "[DONE]"]
        return [token for chunk in chunks if "choices" in chunk for token in chunk["choices"][0]["token_ids"]]

    def error(self, prompt: str) -> str | None:
        last = self.events[prompt][-1]  # [DONE] is for answers that are whole
        return None if last == "[DONE]" else str(json.loads(last)["error"]["message"])


def replicas_of(server: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.client.get("/health").json()["replicas"]
    return found


def test_two_replicas_serve_and_each_that_dies_takes_its_own_alone(
    model: str, tmp_path: Path, alone: dict[str, list[int]]
):
    flags = (*DUMMY, "--dp", "2", "--api-servers", "2", "--max-model-len", "4K", "--served-model-name", "tiny")
    flags += ("--restart-on-failure", "0")
    with serve(tmp_path, model, *flags, "--kv-cache-memory-bytes", "32MiB") as server:
        assert re.search(r"replicas +2, routing prefix; the values below are per replica", server.output())
        assert re.search(r"KV cache +16\.0 MiB", server.output())
        family = children(server.process)
        assert len(family) == 3, "two cores and one more API process"
        for _ in range(2):
            assert all(ask(server, prompt) == alone[prompt][:6] for prompt in PROMPTS)
        assert set(placed(server)) == {0, 1}
        assert server.metric("redline:replica_up") == 2
        assert server.metric("vllm:generation_tokens_total") == 48
        assert server.metric("redline:replica_generation_tokens_total") == 48
        assert httpx.post(f"{server.url}/reset_prefix_cache", json={}).status_code == 200

        streams = Streams(server, PROMPTS)
        first = replicas_of(server)[0]
        os.kill(first["process"], signal.SIGKILL)
        streams.wait()
        cause = f"replica 0: the EngineCore (process {first['process']}) was killed by SIGKILL"
        failed = [prompt for prompt in PROMPTS if (streams.error(prompt) or "").startswith(cause)]
        finished = [prompt for prompt in PROMPTS if streams.tokens(prompt) == alone[prompt]]
        assert sorted(failed + finished) == PROMPTS
        assert failed
        assert finished
        for prompt in failed:
            read = streams.tokens(prompt)
            assert read == alone[prompt][: len(read)]
        for _ in range(4):  # whichever process answers
            health = httpx.get(f"{server.url}/health")
            assert (health.status_code, health.json()["status"]) == (200, "degraded")
            assert [one["status"] for one in health.json()["replicas"]] == ["dead", "ok"]
            assert all(ask(server, prompt) == alone[prompt][:6] for prompt in PROMPTS)
            assert server.metric("redline:replica_up") == 1
        assert server.metric("vllm:generation_tokens_total") >= 48 + TOKENS * len(finished) + 4 * 24
        assert "1 of 2 replicas continue to serve" in server.output()

        os.kill(replicas_of(server)[1]["process"], signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert_gone(family)
        last = server.output().splitlines()[-1]
        assert last.startswith("redline: error: no replica is left; replica 1: the EngineCore (process")
        assert "was killed by SIGKILL" in last


def test_what_waits_begins_again_on_the_other_replica(model: str, tmp_path: Path, alone: dict[str, list[int]]):
    """A stopped core takes requests and answers none: killed, it has begun nothing of them."""
    flags = (*DUMMY, "--dp", "2", "--max-model-len", "4K", "--routing", "least-loaded")
    with serve(tmp_path, model, *flags) as server:
        victim = replicas_of(server)[0]["process"]
        os.kill(victim, signal.SIGSTOP)
        answers: dict[str, list[int]] = {}
        threads = [
            threading.Thread(target=lambda prompt=prompt: answers.update({prompt: ask(server, prompt)}))
            for prompt in PROMPTS
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while len(answers) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert len(answers) < len(PROMPTS), "the first one waits for the replica that is stopped"
        os.kill(victim, signal.SIGKILL)
        for thread in threads:
            thread.join(30)
        assert answers == {prompt: alone[prompt][:6] for prompt in PROMPTS}
        assert set(placed(server)) == {1}
        assert re.search(r"replica 0: retrying \d requests? that had no output", server.output())
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0


def test_the_python_api_shares_out_its_prompts(model: str, alone: dict[str, list[int]]):
    with LLM(model, load_format="dummy", max_model_len=4096, data_parallel_size=2) as llm:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        found = llm.generate(PROMPTS, params)
        assert [one.outputs[0].token_ids for one in found] == [alone[prompt][:6] for prompt in PROMPTS]
        llm.reset_prefix_cache()
        router = llm._client
        stats = [replica.total_stats.core.generation_tokens for replica in router.replicas]  # type: ignore[union-attr]
        assert stats == [12, 12]


def test_a_start_that_fails_leaves_nobody(model: str):
    assert_one_line(
        run(model, *DUMMY, "--dp", "2", "--kv-cache-memory-bytes", "1MiB", "--max-model-len", "4K"),
        1, "for each of 2 replicas", "--kv-cache-memory-bytes", "a lower --dp",
    )  # fmt: skip


@pytest.mark.parametrize(("flag", "value", "said"), [("--dp", "0", "must be at least 1"), ("--routing", "x", "'x'")])
def test_flags_that_cannot_hold_say_so(model: str, flag: str, value: str, said: str):
    assert_one_line(run(model, flag, value), 2, flag, said)
