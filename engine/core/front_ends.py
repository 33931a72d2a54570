"""Front ends that ended and were replaced: their requests are aborted, including those that arrive later."""

from collections.abc import Iterable

from engine.messages import front_end_of, make_handle


class EndedFrontEnds:
    """The lowest handle of each front end that is still accepted."""

    def __init__(self) -> None:
        self._lowest: dict[int, int] = {}  # by front end; those that never ended aren't here

    def add(self, front_end: int, first_sequence: int) -> None:
        """Record that a front end ended. The one that replaces it numbers its requests from `first_sequence` on."""
        self._lowest[front_end] = make_handle(front_end, first_sequence)

    def is_stale(self, handle: int) -> bool:
        """Whether a request is from a front end that ended."""
        return bool(self._lowest) and handle < self._lowest.get(front_end_of(handle), 0)

    def find_stale(self, handles: Iterable[int]) -> list[int]:
        return [handle for handle in handles if self.is_stale(handle)]
