"""Logits at a fixed address, where captured steps write and read them."""

from torch import Tensor


class KeptLogits:
    """Logits of the newest step, copied to memory that is allocated once, by the first step that runs.

    rows: most of a captured step. A step with more (draft tokens, prompt logprobs) keeps its own tensor.
    """

    def __init__(self, rows: int):
        self._rows = rows
        self._kept: Tensor | None = None

    def keep(self, logits: Tensor) -> Tensor:
        """The same logits [n, vocabulary], at the fixed address."""
        if len(logits) > self._rows:
            return logits
        if self._kept is None:
            self._kept = logits.new_empty(self._rows, logits.shape[1])
        kept = self._kept[: len(logits)]
        kept.copy_(logits)
        return kept

    def of(self, rows: int) -> Tensor:
        """Those that a captured step kept."""
        assert self._kept is not None
        return self._kept[:rows]
