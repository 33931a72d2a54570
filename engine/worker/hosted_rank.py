"""A rank's process as its host sees it: the executor, from which it gets commands, is elsewhere."""

from engine.children import Failure, ReportingChild
from engine.errors import RedlineError
from engine.worker.rank_protocol import RankOptions


class HostedRank(ReportingChild):
    """Implements `engine.worker.rank_links.LinkedRank`. Reports reach the host only if the executor is out of reach.

    Args:
        host: its name in messages; empty: this machine.
    """

    def __init__(self, options: RankOptions, host: str = ""):
        super().__init__(
            "engine.worker.rank",
            options,
            name=f"rank {options.rank} on {host}" if host else f"rank {options.rank}",
            memory_advice="lower --kv-cache-memory-bytes",
        )

    def error(self, failure: Failure | None, *, named: bool = True) -> RedlineError:
        if failure is None:
            report = self.next_report()
            failure = report if isinstance(report, Failure) else None
        return super().error(failure, named=named)
