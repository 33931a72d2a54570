"""The scheduler's table of rows: one column a fact, so that a step over all rows is a few vector operations.

Per row, in tokens of its request:

    0 ─────────── computed ───── known ─ upper ───────────── limit
    KV scheduled ─┘              │       │                   └ the request ends here at the latest
    ids confirmed ───────────────┘       └ known + sampled by steps still in flight

A row is owed `upper - computed` tokens: one is a decode, more a prefill. A step that brings `computed` to `upper`
samples, which raises `upper` at once and `known` when the token arrives.
"""

import numpy as np
from numpy.typing import NDArray

from engine.core.request import Request

MAX_STOP_IDS = 8  # compared for all rows at once; a request with more is looked at on its own


class Rows:
    """Columns over `count` rows; a request's tokens live here while it has a row."""

    def __init__(self, count: int, max_model_len: int):
        self.count = count
        self.live = np.zeros(count, np.bool_)
        self.generation = np.zeros(count, np.int32)
        self.handle = np.zeros(count, np.int64)
        self.computed = np.zeros(count, np.int32)
        self.known = np.zeros(count, np.int32)
        self.upper = np.zeros(count, np.int32)
        self.pending = np.zeros(count, np.int32)  # steps in flight that sample for the row; counted only with drafts
        self.limit = np.zeros(count, np.int32)
        self.prompt_len = np.zeros(count, np.int32)
        self.min_tokens = np.zeros(count, np.int32)
        self.items_end = np.zeros(count, np.int32)  # past the last placeholder of an item; 0: it has none
        self.num_blocks = np.zeros(count, np.int32)  # as many as all its tokens fill, also where a window has left some
        self.published = np.zeros(count, np.int32)  # leading blocks that are named in the prefix cache
        self.stop_ids = np.full((count, MAX_STOP_IDS), -1, np.int32)
        self.many_stop_ids = np.zeros(count, np.bool_)
        self.tokens = np.zeros((count, max_model_len + 1), np.int32)
        self.tables: list[list[list[int]]] = [[] for _ in range(count)]  # see engine.core.kv
        self.owner: list[Request | None] = [None] * count
        self.order: dict[int, None] = {}  # live rows, oldest admission first
        self._free = list(range(count - 1, -1, -1))

    @property
    def running(self) -> int:
        return len(self.order)

    @property
    def has_free(self) -> bool:
        return bool(self._free)

    def take(self, request: Request, computed: int, num_blocks: int) -> int:
        """Give a request a row for its known tokens, of which the KV of the first `computed` is there already."""
        row = self._free.pop()
        message, length = request.message, len(request.tokens)
        self.live[row] = True
        self.handle[row] = request.handle
        self.computed[row] = computed
        self.known[row] = self.upper[row] = length
        self.pending[row] = 0
        self.limit[row] = request.limit
        self.prompt_len[row] = request.prompt_len
        self.min_tokens[row] = message.min_tokens
        self.items_end[row] = request.items_end
        self.num_blocks[row] = num_blocks
        self.published[row] = 0
        stop_ids = message.stop_ids[:MAX_STOP_IDS]
        self.stop_ids[row] = -1
        self.stop_ids[row, : len(stop_ids)] = stop_ids
        self.many_stop_ids[row] = len(message.stop_ids) > MAX_STOP_IDS
        self.tokens[row, :length] = request.tokens
        self.owner[row] = request
        self.order[row] = None
        request.row = row
        return row

    def give_back(self, row: int) -> Request:
        """Take the row from its request, which keeps its confirmed tokens; results still in flight no longer match."""
        request = self.owner[row]
        assert request is not None, f"row {row} has no owner"
        request.tokens = self.tokens[row, : self.known[row]].copy()
        request.row = -1
        self.owner[row] = None
        self.live[row] = False
        self.generation[row] += 1
        del self.order[row]
        self._free.append(row)
        return request

    def stopped(self, rows: NDArray[np.intp], tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of the rows just got a token that ends them."""
        hit = (self.stop_ids[rows] == tokens[:, None]).any(axis=1)
        for at in np.flatnonzero(self.many_stop_ids[rows]):
            owner = self.owner[rows[at]]
            hit[at] = owner is not None and int(tokens[at]) in owner.stop_ids
        if hit.any():
            hit &= self.known[rows] - self.prompt_len[rows] >= self.min_tokens[rows]
        return hit
