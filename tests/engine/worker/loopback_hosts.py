"""Ranks over TCP that are processes of this machine."""

from collections.abc import Callable

from engine.worker.hosted_rank import HostedRank
from engine.worker.rank_protocol import RankOptions
from engine.worker.rank_store import LOOPBACK


class LoopbackHosts:
    """Implements `engine.worker.tcp_links.RankHosts`.

    Args:
        change: called with the options of each rank before it is started.
    """

    address = LOOPBACK

    def __init__(self, change: Callable[[RankOptions], object] | None = None):
        self._change = change
        self.closed = False

    def address_of(self, _rank: int) -> str:
        return LOOPBACK

    def start(self, options: RankOptions) -> HostedRank:
        if self._change is not None:
            self._change(options)
        return HostedRank(options)

    def close(self) -> None:
        self.closed = True
