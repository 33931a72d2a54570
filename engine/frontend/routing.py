"""The choice of a replica for a request: bookkeeping in tokens, without sockets, clocks or streams.

The request goes to the replica of least cost:

    cost = tokens left to compute for earlier requests - PREFIX_WEIGHT * tokens of the prompt in its prefix cache

Computing a prefix on a second replica costs its tokens. If the caches are full, it also evicts another prefix, which
must then be computed again: hence PREFIX_WEIGHT = 2. A prefix of m tokens thus attracts its requests to the replica
that has it cached, until that replica has 2 m tokens more to compute than another one; the other one then computes and
caches the prefix too.

The cached prefixes are estimated, not queried: the blocks that were assigned to a replica last, up to the size of its
KV cache, and those that it evicts from there, up to the sizes of host memory and files (`--kv-spill`). A wrong estimate
costs time, never correctness. A block in host memory or in a file counts as one in the KV cache: to copy or read it
takes a small part of the time to compute it.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.arrays import Int32s
from engine.columns import column
from engine.core.hashing import NO_KEYS, extend_hashes, mm_block_keys, root_hash
from engine.frontend.feature_cache import PromptInputs, placed_inputs
from engine.frontend.streams import RequestOptions
from engine.messages import MMInputRef

PREFIX_WEIGHT = 2  # of a cached token of the prompt, against a token left to compute
INITIAL_OUTPUT_TOKENS = 128.0  # expected of an output before any has ended
OUTPUT_WINDOW = 32  # the expected length is a moving mean over about so many outputs


def prompt_block_hashes(
    prompt: Sequence[int] | Int32s, options: RequestOptions, block_size: int, inputs: PromptInputs = ()
) -> list[bytes]:
    """The core's hashes of the full blocks of a prompt: a chain over tokens, inputs, cache salt and adapter.

    There are none if the core replaces the placeholders of inputs.
    """
    placed = [one for one in placed_inputs(inputs) if one.offset >= 0]
    if len(placed) < len(inputs):
        return []
    return block_hashes(prompt, options, block_size, [one.input.ref_at(one.offset) for one in placed])


def block_hashes(
    prompt: Sequence[int] | Int32s, options: RequestOptions, block_size: int, mm_inputs: Sequence[MMInputRef]
) -> list[bytes]:
    """The core's hashes of the full blocks of a prompt; `mm_inputs` by offset."""
    hashes: list[bytes] = []
    tokens = column(prompt)
    keys = mm_block_keys(mm_inputs, block_size, tokens) if mm_inputs else NO_KEYS
    extend_hashes(hashes, root_hash(options.cache_salt, options.adapter), tokens, block_size, keys)
    return hashes


class PrefixIndex:
    """The blocks that a replica is expected to have cached: those recorded last in its KV cache, and of those that left
    it the last ones in each further tier, by the rules of `engine.core.tiered_kv_cache`."""

    def __init__(self, capacity: int, spilled: Sequence[int] = ()):
        """`capacity`: blocks of the KV cache; `spilled`: of each further tier, host memory first."""
        self.capacity = capacity
        self._hashes: OrderedDict[bytes, None] = OrderedDict()  # least recently recorded first
        self._tiers = [_Tier(blocks) for blocks in spilled if blocks]

    def __len__(self) -> int:
        """Of them, those in the KV cache."""
        return len(self._hashes)

    def count_leading(self, hashes: Sequence[bytes]) -> int:
        """The number of a prompt's leading blocks that are cached."""
        return next((count for count, one in enumerate(hashes) if one not in self), len(hashes))

    def __contains__(self, key: bytes) -> bool:
        return key in self._hashes or any(key in tier.keys for tier in self._tiers)

    def record(self, hashes: Sequence[bytes]) -> None:
        """A prompt with these blocks was assigned. As in the core, its last blocks are evicted before its first."""
        known = self._hashes
        for one in reversed(hashes[: self.capacity]):
            if self._tiers and one not in known:
                self._fetch(one)
            known[one] = None
            known.move_to_end(one)
        while len(known) > self.capacity:
            evicted, _ = known.popitem(last=False)
            for tier in self._tiers:
                tier.use(evicted)

    def _fetch(self, key: bytes) -> None:
        """A block is used that the KV cache lacks. From a file it gets into host memory first."""
        host, tiers = self._tiers[0], [tier for tier in self._tiers if key in tier.keys]
        if tiers and host not in tiers:
            tiers.append(host)
        for tier in tiers:
            tier.use(key)

    def clear(self) -> None:
        self._hashes.clear()
        for tier in self._tiers:
            tier.keys.clear()


class _Tier:
    """A place for blocks outside of the KV cache: the ones used last, `capacity` at most."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.keys: OrderedDict[bytes, None] = OrderedDict()  # least recently used first

    def use(self, key: bytes) -> None:
        """A block is written here, or read from here."""
        self.keys[key] = None
        self.keys.move_to_end(key)
        if len(self.keys) > self.capacity:
            self.keys.popitem(last=False)


class OutputLengthEstimate:
    """The expected number of tokens of an output: a moving mean, limited by its max_tokens."""

    def __init__(self) -> None:
        self.mean = INITIAL_OUTPUT_TOKENS

    def observe(self, tokens: int) -> None:
        self.mean += (tokens - self.mean) / OUTPUT_WINDOW

    def expected(self, max_tokens: int | None) -> float:
        return self.mean if max_tokens is None else min(self.mean, max_tokens)


class CountedOutput(Protocol):
    """An output of which `count` tokens have arrived."""

    handle: int
    count: int


class LoadEstimate:
    """Tokens left to compute for live outputs: the prompt until the first token, the expected output until the end."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self._left: dict[int, float] = {}  # by handle
        self._prompts: deque[tuple[CountedOutput, float]] = deque()  # in the order of arrival, ended outputs included

    def add_output(self, output: CountedOutput, prompt_tokens: float, expected_tokens: float) -> None:
        self._left[output.handle] = prompt_tokens + expected_tokens
        self.tokens += prompt_tokens + expected_tokens
        self._prompts.append((output, prompt_tokens))

    def remove_computed_prompts(self) -> None:
        """Subtract the prompts of outputs that have tokens. Prompts are computed in about the order of arrival."""
        prompts = self._prompts
        while prompts and (prompts[0][0].count or prompts[0][0].handle not in self._left):
            output, prompt_tokens = prompts.popleft()
            if output.handle in self._left:
                self._left[output.handle] -= prompt_tokens
                self.tokens -= prompt_tokens

    def remove_output(self, handle: int) -> None:
        self.tokens -= self._left.pop(handle, 0.0)
        if not self._left:  # drops rounding errors
            self.tokens = 0.0
            self._prompts.clear()


class Candidate(NamedTuple):
    """A replica that could take a request; in tokens."""

    load: float  # left to compute
    cached: int  # of the request's prompts
    assigned: float  # in total, since the start


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """A way to choose: `choose` takes the candidates and returns the position of one."""

    choose: Callable[[Sequence[Candidate]], int]
    by_prefix: bool = False  # whether it needs `Candidate.cached`


def make_routing_policy(name: str, seed: int) -> RoutingPolicy:
    """The policy of a name of `engine.config.ROUTINGS`; `seed` is that of random routing."""
    if name == "random":
        draw = random.Random(seed)
        return RoutingPolicy(lambda candidates: draw.randrange(len(candidates)))
    return RoutingPolicy(least_cost, by_prefix=name == "prefix")


def least_cost(candidates: Sequence[Candidate]) -> int:
    """The position of the candidate of least cost; of equal ones, the one that was assigned the fewest tokens."""

    def cost(position: int) -> tuple[float, float]:
        candidate = candidates[position]
        return candidate.load - PREFIX_WEIGHT * candidate.cached, candidate.assigned

    return min(range(len(candidates)), key=cost)


def cached_tokens(
    hashes: Iterable[Sequence[bytes]], lengths: Iterable[int], prefixes: PrefixIndex, block_size: int
) -> list[int]:
    """For each prompt, the tokens found in the cache, except the last one, from which the first output token comes."""
    return [
        max(0, min(prefixes.count_leading(blocks) * block_size, length - 1))
        for blocks, length in zip(hashes, lengths, strict=True)
    ]
