"""Ranks on two Ray nodes of this machine: the tokens of one rank, and an end that names rank and node."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.devices.probe import torch_build
from engine.errors import ConfigError
from engine.ray_cluster import connect_ray
from tests.cluster.ray_nodes import ROOT, Cluster, no_namespaces, ray_nodes
from tests.engine.test_kv_spill_served import PROMPTS as SPILLED
from tests.engine.test_kv_spill_served import Served
from tests.engine.test_ranks import NEW, PROMPTS, SHARED, build_divisible, serve_all
from tests.engine.worker.driver import BASE
from tests.engine.worker.lora_files import write_adapter
from tests.engine.worker.mm_driver import Prompts
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import MMReference
from tests.engine.worker.test_multiprocess import gone

PATIENCE_S = 120.0
WITHIN_S = 10.0  # from a death to the error with its cause


@pytest.fixture(scope="module")
def second_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache on the second node, with the kernels that are compiled already."""
    folder = tmp_path_factory.mktemp("cache")
    here = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "kernels"
    here.mkdir(parents=True, exist_ok=True)
    (folder / "redline").mkdir()
    (folder / "redline" / "kernels").symlink_to(here)
    return folder


@pytest.fixture(scope="module")
def first_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose content the second node lacks, if the nodes are machines of their own."""
    return tmp_path_factory.mktemp("first-only")


@pytest.fixture(scope="module")
def cluster(second_cache: Path, first_only: Path) -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="needs the extra `ray`")
    with ray_nodes(({}, {"XDG_CACHE_HOME": str(second_cache)}), hidden=first_only, gpus=1) as started:
        yield started


@contextmanager
def running(cluster: Cluster, module: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """A command on the head's machine; it and what it has started end with the context."""
    process = subprocess.Popen(
        cluster.command("-m", module, *arguments), cwd=ROOT, env=cluster.environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.communicate()
        for one in family:
            if one.is_running():
                one.kill()


def last_line(process: "subprocess.Popen[str]") -> Any:
    """The last line that a command prints, decoded, once it has ended."""
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err[-4000:]
    return json.loads(out.strip().splitlines()[-1])


def test_ranks_on_two_nodes_say_what_one_says_until_one_is_killed(
    cluster: Cluster, second_cache: Path, first_only: Path
) -> None:
    """Pipeline stages, then tensor parallelism with an adapter; files are sent if the nodes are two machines."""
    folder, adapter = first_only / "model", first_only / "adapter"
    write_adapter(adapter, build_divisible(folder), ("q_proj", "down_proj"), 1)
    expected, with_adapter = (serve_all(folder, 1, adapters=used)[0] for used in ({}, {"one": adapter}))
    assert expected != with_adapter
    with running(cluster, "tests.cluster.tokens", str(folder), str(adapter), cluster.address) as process:
        stages, found = (json.loads(read_line(process)) for _ in range(2))
        [rank] = cluster.nodes[1].ranks()
        assert_ends(process, lambda: os.kill(rank.pid, signal.SIGKILL), cluster, rank, "was killed by SIGKILL")
    sent = {path.name for path in second_cache.glob("redline/distributed/*/*")}
    assert ({"config.json", "model.safetensors", "adapter_model.safetensors"} <= sent) == (not no_namespaces())
    assert stages["tokens"] == expected
    assert found["tokens"] == with_adapter
    for one in (stages, found):
        assert one["nodes"] == [node.address for node in cluster.nodes]
        assert [len(output) for output in one["tokens"]] == [NEW] * len(PROMPTS)
        assert one["chunks"] > 3
        assert one["preemptions"] > 0
        assert one["prefix_hits"] >= len(SHARED)
        assert one["in_flight"] > 0
    assert stages["in_flight"] > 1, "each stage has a step"


@pytest.mark.skipif(bool(no_namespaces()), reason="the nodes need machines of their own")
def test_what_a_node_lacks_is_named(cluster: Cluster, first_only: Path, tmp_path: Path) -> None:
    """Files, without --distribute-weights: none, or others. GPUs that this build of PyTorch can't use."""
    missing, other, adapter = first_only / "missing", first_only / "other", first_only / "lora"
    (tmp_path / "config.json").write_text("{}")
    for folder in (missing, other, cluster.nodes[1].own_view(other)):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"other" if folder in (missing, other) else b"bytes")
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).touch()
    paths = [f"model:{missing}", f"model:{other}", f"model:{tmp_path}", f"adapter:{adapter}", f"adapter:{tmp_path}"]
    with running(cluster, "tests.cluster.provided", str(tmp_path), cluster.address, *paths) as process:
        *errors, gpu = last_line(process)
    node, advice = f"node {cluster.nodes[1].address} has", "or give --distribute-weights"
    assert errors == [
        f"{node} no {missing}: copy the model there, {advice}",
        f"{node} other files in {other} than this machine (model.safetensors): copy the model there, {advice}",
        "",
        f"{node} no {adapter}: copy the adapter there, {advice}",
        "",
    ]
    if "cuda" not in torch_build():
        assert re.search(
            r"^node [\d.]+: the installed PyTorch \(.*\) was built without CUDA: use --device cpu$", gpu
        ), gpu


def test_ranks_share_nothing_with_their_core(cluster: Cluster, first_only: Path) -> None:
    """The second rank does not see feature files, and each node keeps the evicted blocks of its rank."""
    entry, images, folder, files = (MM_MODELS["llava"], *(first_only / name for name in ("llava", "spilled", "files")))
    reference = MMReference(entry.build(images), entry)
    build_divisible(folder)
    with Served(folder, blocks=200) as served:
        expected = served.run(SPILLED)
    with running(cluster, "tests.cluster.apart", cluster.address, str(images), str(folder), str(files)) as process:
        found = last_line(process)
    assert found["of images"] == [reference.run(request)[0] for request in Prompts(images, entry).samples()]
    assert found["tokens"] == [expected, expected]
    assert found["hits"] > 0
    assert found["folders"] == (2 if no_namespaces() else 1)
    assert not [*files.iterdir(), *cluster.nodes[1].own_view(files).iterdir()]


def test_too_small_a_cluster_is_an_error_of_one_line(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    backend = ["--distributed-executor-backend", "ray", "--ray-address", cluster.address]
    with running(
        cluster, "cli.main", "serve", str(tmp_path), "--load-format", "dummy", "--tp", "4", *backend
    ) as process:
        _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("redline: error: the Ray cluster has 2 CPUs on 2 nodes, and 4 ranks need one each")


# It leaves no cluster: the last of those that need one.
def test_a_node_that_is_gone_ends_the_engine_with_its_cause(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    with running(cluster, "tests.cluster.serving_until_lost", str(tmp_path), cluster.address) as process:
        assert read_line(process) == "generating\n"
        [rank] = cluster.nodes[1].ranks()
        assert_ends(process, cluster.nodes[1].kill, cluster, rank, "(can't be reached any more|ended with)")


def assert_ends(
    process: "subprocess.Popen[str]", kill: Callable[[], None], cluster: Cluster, rank: psutil.Process, how: str
) -> None:
    """Kill something of the second node: the command ends in time, and says how that node's rank ended."""
    [other] = cluster.nodes[0].ranks()
    killed = time.monotonic()
    kill()
    found = last_line(process)
    cause = rf"^rank 1 on node {cluster.nodes[1].address} \(process {rank.pid}\) {how}"
    assert re.search(cause, found["error"]), found["error"]
    print(f"{found['error']}: after {found['at'] - killed:.2f} s")
    assert found["at"] - killed < WITHIN_S
    assert gone(other.pid)


def read_line(process: "subprocess.Popen[str]") -> str:
    """The first line that is not Ray's."""
    assert process.stdout is not None
    while (line := process.stdout.readline()).startswith("("):
        pass
    if not line:
        pytest.fail(process.communicate(timeout=PATIENCE_S)[1][-4000:])
    return line


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"needs Ray: pip install 'redline-llm\[ray\]'"):
        connect_ray(None)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (
            "127.0.0.1:1",
            r"^--ray-address 127.0.0.1:1 can't be reached \(.*refused\): is the head of the cluster running",
        ),
        ("ray://10.0.0.1:10001", r"^--ray-address ray://10.0.0.1:10001: the engine can't be a Ray client; run it on"),
        ("head", r"^--ray-address must be HOST:PORT, such as 10.0.0.1:6379, not 'head'"),
    ],
)
def test_a_head_out_of_reach_is_named(address: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=words):
        connect_ray(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=words.replace("--ray-address", "RAY_ADDRESS")):
        connect_ray(None)
