"""Where the ranks of a model find each other: a file if all are on one machine, else a port of the executor's machine.

    /tmp/…/store                              a file
    tcp://10.0.0.1:40123/10.0.0.2/ranks       the port, the address of the rank itself, a name

A place may be extended by text at its end: what joins at an extended place does not meet what joins at another.
"""

import socket
from urllib.parse import urlsplit

import torch.distributed as dist

from engine.curve import tcp_address

LOOPBACK = "127.0.0.1"


class StoreServer:
    """The port at which ranks find each other. What is exchanged there are the addresses of their collectives.

    Args:
        address: of this machine, as the ranks' machines reach it.
    """

    def __init__(self, address: str):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listening = socket.create_server((address, 0), family=family)
        self._port = listening.getsockname()[1]
        self._address = address
        # Given a socket, torch does not listen on all interfaces.
        self._store = dist.TCPStore(
            address, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )

    def place(self, own_address: str) -> str:
        """The place for a rank with this address."""
        return f"{tcp_address(self._address, self._port)}/{own_address}/ranks"

    def close(self) -> None:
        del self._store


def open_store(place: str, size: int) -> tuple[dist.Store, str]:
    """The store of a place for `size` ranks, and the address of this rank for collectives."""
    if not place.startswith("tcp://"):
        return dist.FileStore(place, size), LOOPBACK
    parts = urlsplit(place)
    assert parts.hostname, place
    assert parts.port, place
    own_address, _, name = parts.path.removeprefix("/").partition("/")
    return dist.PrefixStore(name, dist.TCPStore(parts.hostname, parts.port, is_master=False)), own_address
