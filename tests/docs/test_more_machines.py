"""docs/serving/more-machines.md: its commands serve a model on two machines, and the files that it names exist."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.ray_nodes import Cluster, Node, ray_nodes
from tests.deploy.manifests import KUSTOMIZATIONS, own_commands
from tests.docs.blocks import BLOCKS, ROOT
from tests.serving import START_S, free_port

PAGE = "docs/serving/more-machines.md"
THIS = "tests/docs/test_more_machines.py"
FIRST = "10.0.0.1"  # the address of the first machine on the page


def commands() -> list[str]:
    """Those that this file runs, in their order."""
    return [command for block in BLOCKS if block.page == PAGE and block.tested_by == THIS for command in block.commands]


def start_options(command: str) -> list[str]:
    """The options of a `ray start` command, as `ray_nodes` takes them."""
    program, subcommand, *options = shlex.split(command.replace(FIRST, "HOST").replace("6379", "PORT"))
    assert (program, subcommand) == ("ray", "start")
    return options


def on(node: Node, *command: str) -> list[str]:
    return [*node.prefix, *command]


@contextmanager
def served(cluster: Cluster, command: str, port: int, folder: Path) -> Iterator[str]:
    """The server of a `redline serve` command on the first machine, ready; its address."""
    small = ["--max-model-len", "1024", "--kv-cache-memory-bytes", "128MiB"]
    words = [*shlex.split(command)[1:], "--port", str(port), *small]
    url = f"http://{cluster.nodes[0].address}:{port}"
    log = folder / "serve.log"
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address}
    with log.open("wb") as sink:
        process = subprocess.Popen(
            cluster.command("-m", "cli.main", *words), env=environment, stdout=sink, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + START_S
    try:
        ask = on(cluster.nodes[1], "curl", "--silent", "--fail", f"{url}/health")
        while subprocess.run(ask, capture_output=True).returncode != 0:
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline, log.read_text(errors="replace")
            time.sleep(0.2)
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(2)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def answer(cluster: Cluster, serve: str, request: str, folder: Path) -> str:
    """The text that a server on all machines generates, asked from the second one."""
    folder.mkdir()
    with served(cluster, serve, free_port(), folder) as url:
        asked = request.replace(f"http://{FIRST}:8000", url)
        assert asked != request
        done = subprocess.run(on(cluster.nodes[1], "bash", "-c", asked), capture_output=True, text=True)
    choices = json.loads(done.stdout)["choices"]
    return str(choices[0]["text"])


def waits_for_nodes(cluster: Cluster) -> str:
    """Run what the Kubernetes manifest does before it starts a server; what it printed if it failed."""
    [script] = [words[-1] for _, words in own_commands() if "ray start --head" in words[-1]]
    waiting = script[script.index("cpus()") : script.index("exec redline serve")]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.address, "PATH": path}
    command = on(cluster.nodes[0], "bash", "-ec", waiting)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=START_S)
    return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.mark.real
def test_the_commands_serve_a_model_on_two_machines(tmp_path: Path) -> None:
    head, join, ranks, request, replicas = commands()
    starts = [[*start_options(head), "--include-dashboard=false"], start_options(join)]
    with ray_nodes(cpus=(1, 2), starts=starts) as cluster:
        assert waits_for_nodes(cluster) == ""
        texts = [
            answer(cluster, serve, request, tmp_path / name)
            for name, serve in (("ranks", ranks), ("replicas", replicas))
        ]
    assert all(texts), texts
    log = (tmp_path / "ranks" / "serve.log").read_text()
    assert all(node.address in log for node in cluster.nodes), log


def test_files_and_folders_that_the_page_names_exist() -> None:
    text = (ROOT / PAGE).read_text()
    named = set(re.findall(r"\bdeploy/[\w./-]+", text))
    assert named
    assert not [path for path in named if not (ROOT / path.rstrip("./")).exists()]
    applied = {ROOT / path for path in re.findall(r"--kustomize (\S+)", text)}
    assert applied <= set(KUSTOMIZATIONS)
    listed = {ROOT / path for path in re.findall(r"^\| `(deploy/[\w/-]+)` \|", text, re.MULTILINE)}
    assert listed == set(KUSTOMIZATIONS)
