"""Which replica a request goes to: bookkeeping in tokens, without sockets, clocks or streams.

The replica that costs the least gets the request:

    cost = tokens left to compute for what it was given before - WORTH * tokens of the prompt that it holds

A prefix that is computed a second time, elsewhere, costs its tokens, and where caches are full the place of another
one, which must then be computed again: hence WORTH = 2. So a prefix of m tokens draws its requests to the replica that
holds it until that one has 2 m tokens more to do than another, which then holds it too. What a replica holds is
believed, not asked: it is what it was given last, up to the size of its KV cache. A belief that is wrong costs time,
never correctness, and is right again once the replica has computed the prefix.
"""

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.core.hashing import extend_hashes, root_hash
from engine.frontend.streams import Output, Terms
from engine.messages import column

WORTH = 2  # times its tokens: of a prefix that is held
FIRST_LENGTH = 128.0  # tokens that an output is expected to have, before any has ended
LEARNT_FROM = 32  # outputs that the expected length is a mean of, about


def block_names(prompt: Sequence[int], terms: Terms, block_size: int) -> list[bytes]:
    """Names of a prompt's full blocks that are equal where the core's are: a chain over tokens, salt and adapter."""
    names: list[bytes] = []
    extend_hashes(names, root_hash(terms.cache_salt, terms.adapter), column(prompt), block_size)
    return names


class Held:
    """The blocks that a replica is believed to hold: those named last, `capacity` at most."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def leading(self, names: Sequence[bytes]) -> int:
        """How many of a prompt's first blocks are held."""
        held = self._names
        return next((count for count, name in enumerate(names) if name not in held), len(names))

    def note(self, names: Sequence[bytes]) -> None:
        """A prompt with these blocks was given; as in the core, its tail is forgotten before its head."""
        held = self._names
        for name in reversed(names[: self.capacity]):
            held[name] = None
            held.move_to_end(name)
        while len(held) > self.capacity:
            held.popitem(last=False)

    def clear(self) -> None:
        self._names.clear()


class Lengths:
    """How many tokens an output is expected to have: as those that ended lately, and no more than it may."""

    def __init__(self) -> None:
        self.mean = FIRST_LENGTH

    def learn(self, tokens: int) -> None:
        self.mean += (tokens - self.mean) / LEARNT_FROM

    def expected(self, limit: int | None) -> float:
        return self.mean if limit is None else min(self.mean, limit)


class Backlog:
    """Tokens left to compute for the outputs under way: prompts until their first token, expected ones to the end."""

    def __init__(self) -> None:
        self.tokens = 0.0
        self._left: dict[int, float] = {}  # by handle
        self._prompts: deque[tuple[Output, float]] = deque()  # as given, also of outputs that ended

    def add(self, output: Output, prompt: float, expected: float) -> None:
        self._left[output.handle] = prompt + expected
        self.tokens += prompt + expected
        self._prompts.append((output, prompt))

    def settle(self) -> None:
        """Take off the prompts that are computed; they are about in the order they were given."""
        prompts = self._prompts
        while prompts and (prompts[0][0].count or prompts[0][0].handle not in self._left):
            output, prompt = prompts.popleft()
            if output.handle in self._left:
                self._left[output.handle] -= prompt
                self.tokens -= prompt

    def end(self, handle: int) -> None:
        self.tokens -= self._left.pop(handle, 0.0)
        if not self._left:  # no rest of rounding
            self.tokens = 0.0
            self._prompts.clear()


class Standing(NamedTuple):
    """A replica as a request finds it; in tokens."""

    backlog: float
    held: int  # of the request's prompts
    given: float  # ever


@dataclass(frozen=True, slots=True)
class Routing:
    """A way to choose: `choose` gets the replicas that can take the request, and gives the position of one."""

    choose: Callable[[Sequence[Standing]], int]
    by_prefix: bool = False  # whether it must know what is held


def make_routing(name: str, seed: int) -> Routing:
    """The routing of that name (of `engine.config.ROUTINGS`); `seed` is that of random."""
    if name == "random":
        draw = random.Random(seed)
        return Routing(lambda standings: draw.randrange(len(standings)))
    return Routing(cheapest, by_prefix=name == "prefix")


def cheapest(standings: Sequence[Standing]) -> int:
    """The replica that costs the least; of equal ones that which was given the least."""

    def cost(position: int) -> tuple[float, float]:
        standing = standings[position]
        return standing.backlog - WORTH * standing.held, standing.given

    return min(range(len(standings)), key=cost)


def held_tokens(names: Iterable[Sequence[bytes]], lengths: Iterable[int], held: Held, block_size: int) -> list[int]:
    """For each prompt, how many of its tokens need not be computed: not the last, which the first new one comes of."""
    return [
        max(0, min(held.leading(blocks) * block_size, length - 1))
        for blocks, length in zip(names, lengths, strict=True)
    ]
