"""What a step message will say: collected while a step is planned, packed when it is complete."""

import numpy as np
from numpy.typing import NDArray

from engine.columns import pack_table
from engine.core.items import Items
from engine.core.request import Request
from engine.core.rows import Rows
from engine.messages import RowAdded, StepMessage, column

FEW_BLOCKS = 64  # up to so many are sent as they are: packing takes longer than their bytes


class Changes:
    """For workers that keep their rows: only what is new since the last message."""

    def __init__(self, rows: Rows, items: Items) -> None:
        self._rows = rows
        self._items = items
        self._clear()

    def _clear(self) -> None:
        self._removed: list[int] = []
        self._added: list[RowAdded] = []
        self._blocks: list[tuple[int, int, int]] = []

    @property
    def urgent(self) -> bool:
        """Whether workers must hear of them although there is nothing to compute."""
        return bool(self._removed)

    def add(self, row: int, request: Request, computed: int) -> None:
        """A request was given a row, with `computed` tokens in its blocks."""
        self._added.append(self._whole(row, request, request.tokens, computed))

    def _whole(self, row: int, request: Request, tokens: NDArray[np.int32], computed: int) -> RowAdded:
        return RowAdded(
            row=row,
            generation=int(self._rows.generation[row]),
            tokens=tokens.tobytes(),
            prompt_len=request.prompt_len,
            computed=computed,
            blocks=tuple(map(column, self._rows.tables[row])),
            sampling=request.message.sampling,
            adapter=request.adapter,
            items=self._items.named(request),
        )

    def append_block(self, row: int, group: int, block: int) -> None:
        """A row got one more block of KV cache, in one of its tables."""
        self._blocks.append((row, group, block))

    def remove(self, row: int) -> None:
        """A row was taken from its request."""
        self._removed.append(row)
        if self._blocks:  # it was given one earlier in this very step
            self._blocks = [entry for entry in self._blocks if entry[0] != row]

    def message(
        self, step: int, scheduled: NDArray[np.bool_], chunks: list[tuple[int, int]], steps: int
    ) -> StepMessage:
        """Pack the message of a step (or of `steps` in a burst) that computes the scheduled rows; start anew."""
        resting = np.flatnonzero(self._rows.live & ~scheduled)
        encode, free_items = self._items.take_changes()
        message = StepMessage(
            step=step,
            removed=column(self._removed),
            added=tuple(self._added),
            blocks=self._pack_blocks(),
            chunks=column([(row, n) for row, n in chunks if n != 1] + [(row, 0) for row in resting.tolist()]),
            steps=steps,
            free_items=free_items,
            encode=encode,
        )
        self._clear()
        return message

    def _pack_blocks(self) -> bytes | tuple[int, bytes]:
        count = len(self._blocks)
        return column(self._blocks) if count <= FEW_BLOCKS else (count, pack_table(np.array(self._blocks, np.int32)))


class WholeState(Changes):
    """V0's: workers forget everything after each step, and are sent every request that the next one computes."""

    def __init__(self, rows: Rows, items: Items) -> None:
        super().__init__(rows, items)
        self._sent: list[int] = []  # rows the workers hold

    def message(
        self, step: int, scheduled: NDArray[np.bool_], chunks: list[tuple[int, int]], steps: int
    ) -> StepMessage:
        rows = self._rows
        removed, self._sent = self._sent, np.flatnonzero(scheduled).tolist()
        rows.generation[self._sent] += 1  # nothing is in flight that could still name the last one
        counts = dict(chunks)
        added = []
        for row in self._sent:
            request = rows.owner[row]
            assert request is not None, f"row {row} has no owner"
            known = rows.tokens[row, : rows.known[row]]
            added.append(self._whole(row, request, known, int(rows.computed[row]) - counts.get(row, steps)))
        self._clear()
        encode, free_items = self._items.take_changes()
        return StepMessage(
            step=step,
            removed=column(removed),
            added=tuple(added),
            chunks=column([(row, n) for row, n in chunks if n != 1]),
            steps=steps,
            free_items=free_items,
            encode=encode,
        )
