"""`redline serve --prefill-replicas 1 --decode-replicas 1`: tokens as without, also after the death of a replica."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from redline import LLM, SamplingParams
from tests.cli.test_serve import DUMMY, assert_one_line, run
from tests.serving import Served, serve

pytestmark = pytest.mark.usefixtures("forked_children")

# As many tokens as bytes, of a stand-in tokenizer; the budget of a step is smaller.
PROMPTS = [f"{number} is the beginning of a prompt " + "that goes on and on " * 20 for number in range(4)]
BODY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
ROLES = ("--prefill-replicas", "1", "--decode-replicas", "1", "--dtype", "float32", "--max-model-len", "4K")


@pytest.fixture(scope="module")
def alone(model: str) -> Iterator[dict[str, list[int]]]:
    """What one replica answers."""
    with LLM(model, load_format="dummy", max_model_len=4096, dtype="float32") as llm:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        yield {answer.prompt or "": answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, params)}


def ask(server: Served, prompt: str) -> list[int]:
    answer = httpx.post(f"{server.url}/v1/completions", json={**BODY, "prompt": prompt}, timeout=60)
    assert answer.status_code == 200, answer.text
    tokens: list[int] = answer.json()["choices"][0]["token_ids"]
    return tokens


def test_prompts_are_computed_by_one_replica_and_continued_by_the_other(
    model: str, tmp_path: Path, alone: dict[str, list[int]]
):
    with serve(tmp_path, model, *DUMMY, *ROLES, "--api-servers", "2", "--restart-on-failure", "0") as server:
        assert re.search(r"replicas +2 \(1 for prompts, 1 for outputs\)", server.output())
        assert re.search(r"prompts in transfer +\d", server.output())
        states = server.client.get("/health").json()["replicas"]
        assert [one["role"] for one in states] == ["prefill", "decode"]

        assert all(ask(server, prompt) == alone[prompt] for prompt in PROMPTS)
        assert server.metric("redline:kv_transfers_total") == len(PROMPTS)
        assert server.metric("redline:kv_transfers_lost_total") == 0
        sent = server.metric("redline:kv_blocks_sent_total")
        assert sent > 4 * len(PROMPTS)
        assert server.metric("redline:kv_blocks_received_total") == sent
        assert server.metric("redline:kv_blocks_rejected_total") == 0
        assert server.metric("vllm:generation_tokens_total") == 12 * len(PROMPTS)
        assert all(ask(server, prompt) == alone[prompt] for prompt in PROMPTS), "from the prefix cache"
        assert server.metric("redline:kv_blocks_sent_total") == sent

        os.kill(states[0]["process"], signal.SIGKILL)
        assert httpx.post(f"{server.url}/reset_prefix_cache", json={}).status_code == 200
        assert all(ask(server, prompt) == alone[prompt] for prompt in PROMPTS), "the decode replica does it all"
        assert server.metric("redline:kv_blocks_sent_total") == sent
        os.kill(states[1]["process"], signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert "no replica is left" in server.output().splitlines()[-1]


def test_replicas_of_several_ranks_with_kv_spill_in_the_python_api(model: str, alone: dict[str, list[int]]):
    """The KV cache of each holds two prompts, and host memory all of them, beside those that are sent."""
    roles: dict[str, Any] = {"prefill_replicas": 1, "decode_replicas": 1, "tensor_parallel_size": 2}
    sizes: dict[str, Any] = {"max_model_len": 1024, "kv_cache_memory_bytes": 550 << 10, "kv_spill": "host=64MiB"}
    with LLM(model, load_format="dummy", dtype="float32", **roles, **sizes) as llm:
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        assert [one.outputs[0].token_ids for one in llm.generate(PROMPTS, params)] == list(alone.values())
        core = llm._client.total_stats.core
        assert (core.kv_transfers, core.kv_transfers_lost) == (len(PROMPTS), 0)
        sent = core.kv_blocks_sent
        assert [one.outputs[0].token_ids for one in llm.generate(PROMPTS, params)] == list(alone.values())
        core = llm._client.total_stats.core
        assert core.kv_blocks_sent == sent, "the decode replica has found all of them"
        assert core.spill is not None
        assert core.spill.host_hits > 0


def test_one_role_alone_is_refused(model: str):
    assert_one_line(
        run(model, *DUMMY, "--prefill-replicas", "1"), 2, "--decode-replicas (0)", "must both be at least 1"
    )
