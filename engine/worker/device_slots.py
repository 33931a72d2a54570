"""The slots of an asynchronous device: the host counts tokens before it knows their ids.

A step appends tokens whose ids are only on the device (`extend`); `fill` writes the ids when they have arrived. Changes
of what the device keeps for each slot are recorded, for the next step to take along.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from engine.arrays import Int32s, Int64s
from engine.columns import int32s
from engine.kernels.sampling import PARAMETERS, pack_parameters
from engine.messages import SlotAssignment, StepMessage
from engine.worker.slots import WorkerSlots

UNKNOWN = -1  # the id of a token that the host does not know yet


@dataclass(frozen=True, slots=True)
class AppendedTokens:
    """Tokens that a step appended before the host knew them: their slots, the slots' generations, and positions."""

    slots: Int64s
    generations: Int64s
    positions: Int64s


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Where the state of slots lies in one array of int32 words on the device.

    block tables [groups, slots, blocks] │ sampling parameters [slots, 8], see `engine.kernels.sampling`
    """

    num_groups: int
    max_slots: int
    max_blocks: int

    @property
    def tables(self) -> int:
        """Words of the block tables."""
        return self.num_groups * self.max_slots * self.max_blocks

    @property
    def parameters(self) -> int:
        """Index of the first word of the parameters; they are aligned for 64-bit numbers and vectors of them."""
        return -(-self.tables // 4) * 4

    @property
    def words(self) -> int:
        return self.parameters + self.max_slots * PARAMETERS


class DeviceSlots(WorkerSlots):
    """Slots whose block tables and sampling parameters are also on a device.

    `needs_logits` has the slots that sample on the host: the device applies masks of grammars, temperature, top-k,
    top-p and min-p itself.
    """

    def __init__(
        self, max_slots: int, max_model_len: int, block_size: int, max_draft_tokens: int = 0, num_groups: int = 1
    ):
        super().__init__(max_slots, max_model_len, block_size, max_draft_tokens, num_groups)
        self.proposes_drafts = max_draft_tokens > 0
        self.is_filtered = np.zeros(max_slots, dtype=np.bool_)  # with a temperature, and top-k, top-p or min-p
        self.layout = StateLayout(num_groups, max_slots, self.block_tables.shape[2])
        self._index: list[Int64s] = []
        self._words: list[Int32s] = []

    def extend(self, slots: Int64s) -> AppendedTokens:
        """Append one token to each of `slots`; their ids follow."""
        positions = self.num_tokens[slots]
        self.append_tokens(slots, np.full(len(slots), UNKNOWN, dtype=np.int32))
        return AppendedTokens(slots, self.generation[slots], positions)

    def fill(self, appended: AppendedTokens, tokens: Int32s) -> None:
        """Write the ids of appended tokens, but for slots that have a new request."""
        same = self.generation[appended.slots] == appended.generations
        self.tokens[appended.slots[same], appended.positions[same]] = tokens[same]

    def take_changes(self) -> tuple[Int32s, Int32s]:
        """Words of the device's state that changed since the last call: distinct indices, and the new values."""
        if not self._index:
            return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.int32)
        index, words = np.concatenate(self._index), np.concatenate(self._words)
        self._index, self._words = [], []
        _, last = np.unique(index[::-1], return_index=True)  # of several values for a word the last one counts
        kept = len(index) - 1 - last
        return index[kept].astype(np.int32), words[kept]

    def _apply_changes(self, message: StepMessage) -> None:
        super()._apply_changes(message)
        added = message.unpack_new_blocks()
        later: Counter[tuple[int, int]] = Counter()
        places = np.empty(len(added), dtype=np.int64)
        for i, (slot, group, _) in reversed(list(enumerate(added.tolist()))):
            later[slot, group] += 1
            places[i] = self.num_blocks[group, slot] - later[slot, group]
        self._record(self._table_index(added[:, 1], added[:, 0], places), added[:, 2])

    def _assign(self, assignment: SlotAssignment) -> None:
        super()._assign(assignment)
        slot, sampling = assignment.slot, assignment.sampling
        self.needs_logits[slot] = sampling.logprobs >= 0 or sampling.adjusts_logits
        self.is_filtered[slot] = sampling.temperature > 0 and (
            sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0
        )
        for group, table in enumerate(assignment.block_tables):
            blocks = int32s(table)
            self._record(self._table_index(group, slot, np.arange(len(blocks))), blocks)
        words = pack_parameters(sampling)
        self._record(self.layout.parameters + slot * PARAMETERS + np.arange(len(words)), words)

    def _table_index(self, groups: Int32s | int, slots: Int32s | int, places: Int64s) -> Int64s:
        return (np.int64(groups) * self.layout.max_slots + slots) * self.layout.max_blocks + places

    def _record(self, index: Int64s, words: Int32s) -> None:
        if len(index):
            self._index.append(index)
            self._words.append(words)
