"""Front ends that ended and were followed by others: their requests are aborted, also those that still arrive."""

from collections.abc import Iterable

from engine.messages import front_end_of, make_handle


class FrontEnds:
    """The lowest handle that is still taken of each front end."""

    def __init__(self) -> None:
        self._lowest: dict[int, int] = {}  # by front end; those that never ended aren't here

    def ended(self, front_end: int, first_sequence: int) -> None:
        """A front end ended; that which follows it numbers its requests from `first_sequence` on."""
        self._lowest[front_end] = make_handle(front_end, first_sequence)

    def is_stale(self, handle: int) -> bool:
        """Whether a request is one of a front end that ended."""
        return bool(self._lowest) and handle < self._lowest.get(front_end_of(handle), 0)

    def stale(self, handles: Iterable[int]) -> list[int]:
        return [handle for handle in handles if self.is_stale(handle)]
