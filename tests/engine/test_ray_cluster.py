"""What is said if there is no Ray cluster to use; `tests/engine/worker/test_ray_hosts.py` has the rest."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from engine.ray_cluster import connect_ray
from tests.engine.worker.test_multiprocess import gone


@pytest.mark.parametrize("given", [True, False])
def test_without_a_cluster_the_commands_that_start_one_are_named(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore lines.")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}" if given else None
        with pytest.raises(ConfigError) as caught:
            connect_ray(address)
    where = f"--ray-address {address}" if given else "no Ray cluster is found"
    assert str(caught.value) == (
        f"{where}: Could not find any running Ray instance. Start a node on this machine: `ray start --head`, or `ray "
        "start --address=HOST:PORT` for one of an existing cluster"
    )


def test_an_actor_ends_with_the_raylet_that_started_it() -> None:
    """Its place is taken by a process that starts another one and is killed."""
    actor = "\n".join(
        ("import time", "from engine.ray_cluster import end_with_node", "end_with_node()", "print('up', flush=True)",
         "time.sleep(300)")
    )  # fmt: skip
    raylet = "\n".join(
        ("import subprocess, sys", f"one = subprocess.Popen([sys.executable, '-c', {actor!r}])",
         "print(one.pid, flush=True)", "one.wait()")
    )  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", raylet], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        pid, up = int(process.stdout.readline()), process.stdout.readline()
        assert up == "up\n"
        os.kill(pid, 0)
        process.send_signal(signal.SIGKILL)
        assert gone(pid)
