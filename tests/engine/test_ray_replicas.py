"""`redline serve --dp 2` on two Ray nodes: the tokens of one machine, and lost replicas are started elsewhere."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from redline import LLM, SamplingParams
from tests.cluster import serving_divided, serving_replicas
from tests.cluster.ray_nodes import Cluster, make_cache, no_namespaces, ray_nodes
from tests.tiny import write_tiny

pytest.importorskip("ray")

START_S = 240.0


def alone(model: str, prompts: list[list[int]], new: int, **options: Any) -> list[list[int]]:
    """The tokens of one engine on this machine."""
    options = {"load_format": "dummy", "dtype": "float32", "kv_cache_memory_bytes": 8 << 20, **options}
    with LLM(model, **options) as llm:
        params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        tokens = [list(answer.outputs[0].token_ids) for answer in llm.generate(prompts, params)]
    assert len({token for output in tokens for token in output}) > 10, "a model that repeats itself proves nothing"
    return tokens


@contextmanager
def running(cluster: Cluster, log: Path, module: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A command on the head's machine, which has printed "serving"."""
    with log.open("wb") as sink:
        process = subprocess.Popen(
            cluster.command("-m", module, *arguments), stdout=sink, stderr=subprocess.STDOUT, env=cluster.environment
        )
        try:
            wait_for_line(process, log, "serving")
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for_line(process: "subprocess.Popen[bytes]", log: Path, line: str) -> None:
    deadline = time.monotonic() + START_S
    while f"{line}\n" not in (shown := log.read_text()):
        assert process.poll() is None, shown
        assert time.monotonic() < deadline, shown
        time.sleep(0.2)


def last_line(process: "subprocess.Popen[bytes]", log: Path) -> Any:
    assert process.wait(START_S) == 0, log.read_text()
    return json.loads(log.read_text().splitlines()[-1])


def refusal(cluster: Cluster, model: str, *flags: str) -> str:
    """The last line of a server that does not start."""
    flags = (*flags, "--distributed-executor-backend", "ray", "--ray-address", cluster.address, "--port", "0")
    refused = subprocess.run(
        cluster.command("-m", "cli.main", "serve", model, "--load-format", "dummy", *flags),
        env=cluster.environment, capture_output=True, text=True, timeout=START_S, check=False,
    )  # fmt: skip
    assert refused.returncode == 2, refused.stderr
    return refused.stderr.splitlines()[-1]


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("forked_children")
def test_replicas_that_are_lost_are_started_again_and_elsewhere(tmp_path: Path) -> None:
    """They keep evicted blocks, get the files of the model, and are drained and added meanwhile."""
    folder = tmp_path / "model"
    folder.mkdir()
    model = write_tiny(folder)
    expected = alone(model, serving_replicas.PROMPTS, serving_replicas.NEW, **serving_replicas.SIZES)
    signal_file, disk, cache = tmp_path / "node-is-gone", tmp_path / "disk", tmp_path / "cache"
    with ray_nodes(({}, make_cache(cache)), cpus=(2, 1), hidden=folder) as cluster:
        last = refusal(cluster, model, "--dp", "2", "--tp", "2")
        assert "the Ray cluster has 3 CPUs on 2 nodes, and 2 replicas need 4, one for each of 2 ranks: add" in last
        assert last.endswith("or lower --dp, or lower --tp or --pp")
        arguments = model, cluster.address, str(signal_file), str(disk)
        with running(cluster, tmp_path / "log", "tests.cluster.serving_replicas", *arguments) as process:
            copied = {path.name for path in cache.glob("redline/distributed/*/*")}
            cluster.nodes[1].kill()
            signal_file.touch()
            found = last_line(process, tmp_path / "log")
    assert ("config.json" in copied) == (not no_namespaces())
    assert found["tokens"] == [expected] * 6
    assert found["hits"] > 0
    assert found["folders"] == 2
    assert found["failed"] == []
    assert "the Ray cluster has 2 CPUs on 1 node, of which 2 are used here, and 1 replica needs 1" in found["refused"]
    assert found["restarts"] == 2
    assert found["noticed_s"] < 10
    assert all(f"Ray node {node.address}" in found["output"] for node in cluster.nodes)
    assert "was killed by SIGKILL" in found["output"]
    assert not os.listdir(disk)


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("forked_children")
def test_ranks_of_replicas_are_on_one_node_or_on_several(tmp_path: Path) -> None:
    """The first replica fits on a node, the second one does not, and a rank of it is killed."""
    model = serving_divided.write_model(tmp_path)
    expected = alone(model, serving_divided.PROMPTS, serving_divided.NEW)
    killed = tmp_path / "killed"
    with ray_nodes(cpus=(3, 1)) as cluster:
        last = refusal(cluster, model, "--prefill-replicas", "1", "--decode-replicas", "1", "--tp", "2")
        assert "--prefill-replicas needs all ranks of a replica on one node" in last
        arguments = model, cluster.address, str(killed)
        with running(cluster, tmp_path / "log", "tests.cluster.serving_divided", *arguments) as process:
            [rank] = cluster.nodes[1].ranks()
            assert len(cluster.nodes[0].ranks()) == 3
            os.kill(rank.pid, signal.SIGKILL)
            killed.touch()
            found = last_line(process, tmp_path / "log")
    assert found["tokens"] == [expected] * 3
    first, second = (node.address for node in cluster.nodes)
    assert f"on Ray node {first}" in found["output"]
    assert all(used > 0 for used in found["used"]), "both replicas have answered"
    assert re.search(rf"rank \d on node {second} \(process {rank.pid}\) was killed by SIGKILL", found["killed"])
    assert "the Ray cluster has 4 CPUs on 2 nodes, of which 4 are used here, and 1 replica needs 2" in found["refused"]
