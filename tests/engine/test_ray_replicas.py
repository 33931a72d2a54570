"""`redline serve --dp 2` on two Ray nodes: the tokens of one machine, and lost replicas are started elsewhere."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from redline import LLM, SamplingParams
from tests.cluster.ray_nodes import ray_nodes
from tests.cluster.serving_replicas import PROMPTS
from tests.tiny import write_tiny

pytest.importorskip("ray")

START_S = 240.0


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("forked_children")
def test_replicas_that_are_lost_are_started_again_and_elsewhere(tmp_path: Path) -> None:
    model = write_tiny(tmp_path)
    with LLM(model, load_format="dummy", dtype="float32", max_model_len=1024, kv_cache_memory_bytes=4 << 20) as llm:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        alone = [answer.outputs[0].token_ids for answer in llm.generate(PROMPTS, params)]
    signal_file, log = tmp_path / "node-is-gone", tmp_path / "output"
    with ray_nodes(cpus=(2, 1)) as cluster, log.open("w") as sink:
        flags = ("--dp", "4", "--distributed-executor-backend", "ray", "--ray-address", cluster.address, "--port", "0")
        refused = subprocess.run(
            cluster.command("-m", "cli.main", "serve", model, "--load-format", "dummy", *flags),
            env=cluster.environment, capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert refused.returncode == 2
        assert (
            "the Ray cluster has 3 CPUs, and each of 4 replicas needs one: add nodes" in refused.stderr.splitlines()[-1]
        )
        command = cluster.command("-m", "tests.cluster.serving_replicas", model, cluster.address, str(signal_file))
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
    found = json.loads(log.read_text().splitlines()[-1])
    assert found["tokens"] == [alone] * 4
    assert found["restarts"] == 2
    assert found["noticed_s"] < 10
    assert all(f"Ray node {node.address}" in found["output"] for node in cluster.nodes)
    assert "was killed by SIGKILL" in found["output"]
