"""What is said if there is no Ray cluster to use; `tests/engine/worker/test_ray_hosts.py` has the rest."""

import socket
import sys
from types import SimpleNamespace

import pytest

from engine.errors import ConfigError
from engine.ray_cluster import connect_ray


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
