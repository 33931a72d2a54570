"""Where the tokens of simulated hardware come from: at random, or from the prompt."""

import zlib
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.columns import int32s
from engine.messages import SlotAssignment

# Constants of splitmix64, which turns consecutive numbers into random ones (https://prng.di.unimi.it/splitmix64.c).
INCREMENT, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class TokenSource(Protocol):
    """The next tokens of slots."""

    def assign(self, added: SlotAssignment) -> None:
        """A slot has another request."""
        ...

    def free(self, slots: NDArray[np.integer]) -> None:
        """Slots have no request."""
        ...

    def next(self, slots: NDArray[np.integer], known: NDArray[np.integer]) -> NDArray[np.int64]:
        """A token for each slot; `known` counts the tokens of its request, this one included."""
        ...


class RandomTokens:
    """Tokens of the vocabulary at random, except those that would end the text.

    They follow from the seed of the request and their position; those of a greedy request from its prompt and their
    position.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int):
        self._vocab_size = vocab_size
        self._seeds = np.zeros(max_num_seqs, np.uint64)
        self._stop_ids: dict[int, frozenset[int]] = {}  # by slot
        self._ending = np.zeros(vocab_size, np.int32)  # of each token, how many slots it would end

    def assign(self, added: SlotAssignment) -> None:
        sampling = added.sampling
        prompt = memoryview(added.tokens)[: 4 * added.num_prompt_tokens]
        self._seeds[added.slot] = sampling.seed if sampling.temperature else zlib.crc32(prompt)
        self._forget(added.slot)
        if sampling.stop_ids:
            stop_ids = self._stop_ids[added.slot] = frozenset(sampling.stop_ids)
            self._ending[list(stop_ids)] += 1

    def free(self, slots: NDArray[np.integer]) -> None:
        if self._stop_ids:
            for slot in slots.tolist():
                self._forget(slot)

    def next(self, slots: NDArray[np.integer], known: NDArray[np.integer]) -> NDArray[np.int64]:
        numbers = self._seeds[slots] + known.astype(np.uint64) * np.uint64(INCREMENT)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(FIRST)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(SECOND)
        tokens = ((numbers ^ (numbers >> np.uint64(31))) % np.uint64(self._vocab_size)).astype(np.int64)
        if self._stop_ids:
            for at in np.flatnonzero(self._ending[tokens]).tolist():
                tokens[at] = self._other(int(tokens[at]), self._stop_ids.get(int(slots[at]), frozenset()))
        return tokens

    def _forget(self, slot: int) -> None:
        if (stop_ids := self._stop_ids.pop(slot, None)) is not None:
            self._ending[list(stop_ids)] -= 1

    def _other(self, token: int, stop_ids: frozenset[int]) -> int:
        """The next token that isn't a stop id; the token itself if all are."""
        for step in range(len(stop_ids) + 1):
            other = (token + step) % self._vocab_size
            if other not in stop_ids:
                return other
        return token


class EchoTokens:
    """The tokens of the prompt, then a stop id; without one, the prompt again and again."""

    def __init__(self, max_num_seqs: int, vocab_size: int):
        self._vocab_size = vocab_size
        self._echoes: list[list[int]] = [[] for _ in range(max_num_seqs)]
        self._ends = [-1] * max_num_seqs
        self._num_prompt_tokens = [0] * max_num_seqs
        self._min_tokens = [0] * max_num_seqs

    def assign(self, added: SlotAssignment) -> None:
        slot, stop_ids = added.slot, added.sampling.stop_ids
        prompt = int32s(added.tokens)[: added.num_prompt_tokens]
        kept = prompt[(prompt < self._vocab_size) & ~np.isin(prompt, stop_ids)]  # embeddings have ids above
        self._echoes[slot] = kept.tolist() or [0]
        self._ends[slot] = stop_ids[0] if stop_ids else -1
        self._num_prompt_tokens[slot] = added.num_prompt_tokens
        self._min_tokens[slot] = added.sampling.min_tokens

    def free(self, slots: NDArray[np.integer]) -> None:
        pass

    def next(self, slots: NDArray[np.integer], known: NDArray[np.integer]) -> NDArray[np.int64]:
        pairs = zip(slots.tolist(), known.tolist(), strict=True)
        return np.array([self._token(slot, count - 1 - self._num_prompt_tokens[slot]) for slot, count in pairs], int)

    def _token(self, slot: int, number: int) -> int:
        """The output token of this number, from 0 on."""
        echo, end = self._echoes[slot], self._ends[slot]
        if end >= 0 and number >= max(len(echo), self._min_tokens[slot]):
            return end
        return echo[number % len(echo)]


def make_tokens(kind: str, max_num_seqs: int, vocab_size: int) -> TokenSource:
    """The source of `--simulated-tokens`."""
    return EchoTokens(max_num_seqs, vocab_size) if kind == "echo" else RandomTokens(max_num_seqs, vocab_size)
