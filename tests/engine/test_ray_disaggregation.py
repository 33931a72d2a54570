"""`redline serve --prefill-replicas 1 --decode-replicas 1` on two Ray nodes: blocks go over TCP, lost nodes heal."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from redline import LLM, SamplingParams
from tests.cluster.ray_nodes import Cluster, no_namespaces, ray_nodes
from tests.cluster.serving_roles import PROMPTS
from tests.tiny import write_tiny

pytest.importorskip("ray")

START_S = 240.0


def serve_and_lose(cluster: Cluster, model: str, folder: Path) -> dict[str, Any]:
    """What the script reports; the second node is ended when it serves."""
    signal_file, log = folder / "node-is-gone", folder / "output"
    command = cluster.command("-m", "tests.cluster.serving_roles", model, cluster.address, str(signal_file))
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=cluster.environment)
    try:
        deadline = time.monotonic() + START_S
        while "serving\n" not in (shown := log.read_text()):
            assert process.poll() is None, shown
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)
        cluster.nodes[1].kill()
        signal_file.touch()
        assert process.wait(START_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    found: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return found


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("forked_children")
def test_prefill_and_decode_replicas_on_two_nodes_of_which_one_is_lost(tmp_path: Path) -> None:
    model = write_tiny(tmp_path)
    with LLM(model, load_format="dummy", dtype="float32", max_model_len=1024, kv_cache_memory_bytes=8 << 20) as llm:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        alone = [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, params)]
    with ray_nodes(cpus=(2, 1)) as cluster:
        found = serve_and_lose(cluster, model, tmp_path)
        addresses = [node.address for node in cluster.nodes]

    moments = ("apart", "scaled", "together", "again")
    assert [found[moment]["tokens"] for moment in moments] == [alone] * len(moments)
    for moment in moments:  # a restarted replica is sent to, or sends, as before
        counted = found[moment]
        assert counted["transfers"] == len(PROMPTS), moment
        assert counted["blocks_sent"] == counted["blocks_received"] > 4 * len(PROMPTS), moment
        assert counted["transfers_lost"] == counted["blocks_rejected"] == 0, moment
    assert found["roles"] == ["prefill", "decode", "decode"]

    received_at = set(re.findall(r"KV blocks of prompts are received at tcp://([\d.]+):\d+", found["output"]))
    assert received_at <= set(addresses)
    assert len(received_at) == 1 or not no_namespaces()
    assert all(f"Ray node {address}" in found["output"] for address in addresses)

    under_way = found["under_way"]
    assert all(tokens == alone[number] for number, tokens in under_way["answers"])
    assert under_way["answers"]
    assert under_way["unanswered"] == 0, "a request hangs"
    assert len(under_way["failed"]) <= 1, "at most the request that the lost replica was answering"
    assert found["restarts"] == 2
    assert found["noticed_s"] < 10
