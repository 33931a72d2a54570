"""Items (images, audio) in the scheduler: what is encoded in the coming step, and whose embeddings stay on the device.

An item is a range of placeholder tokens in a prompt, as many as it has embeddings. A step that computes any of them
needs all of its embeddings there: an item is encoded whole, in the step that computes its first placeholder at the
latest, and its embeddings stay until its last placeholder is computed, however many chunks that takes.

    clip() ─► reserve() ─► computed()          for each chunk of a request that has items; text never comes here
    take_changes()                             once a step, for its message
    release()                                  when a request loses its row

A request holds a reference only to items that it has begun, so the holder of an item can always go on to its end, and
whoever waits for room gets it in time.
"""

from collections.abc import Iterator, Sequence

from engine.config import ResolvedConfig
from engine.core.request import Request
from engine.messages import ItemRef


class EncoderCache:
    """Which embeddings are on the device, by key; those that nobody holds go when room is needed, oldest first."""

    def __init__(self, capacity: int, keep: bool = True):
        """`capacity` in embeddings; without `keep` they go as soon as nobody holds them."""
        self.capacity = capacity
        self.used = 0  # embeddings on the device
        self.size_of: dict[bytes, int] = {}
        self.references: dict[bytes, int] = {}
        self._keep = keep
        self._idle: dict[bytes, None] = {}  # without references, first given up first
        self._idle_size = 0
        self._evicted: list[bytes] = []

    def fits(self, size: int) -> bool:
        """Whether so many embeddings that nobody holds now could be held."""
        return size <= self.capacity - self.used + self._idle_size

    def hold(self, key: bytes, size: int) -> bool:
        """Take a reference; True if the item isn't on the device and must be encoded."""
        known = self.size_of.get(key)
        if key in self.references:
            assert known == size, f"an item of {size} embeddings has the name of one of {known} that is held"
            self.references[key] += 1
            return False
        if known not in (None, size):  # another content under the name of one that nobody needs any more
            self._evict_idle(key)
            known = None
        assert self.fits(size), f"{size} embeddings are wanted, {self.capacity - self.used + self._idle_size} fit"
        self.references[key] = 1
        if known is not None:
            del self._idle[key]
            self._idle_size -= size
            return False
        while self.used + size > self.capacity:
            self._evict_idle(next(iter(self._idle)))
        self.size_of[key] = size
        self.used += size
        return True

    def drop(self, key: bytes) -> None:
        """Give a reference back."""
        self.references[key] -= 1
        if self.references[key]:
            return
        del self.references[key]
        if self._keep:
            self._idle[key] = None
            self._idle_size += self.size_of[key]
        else:
            self._evict(key)

    def _evict_idle(self, key: bytes) -> None:
        del self._idle[key]
        self._idle_size -= self.size_of[key]
        self._evict(key)

    def _evict(self, key: bytes) -> None:
        self.used -= self.size_of.pop(key)
        self._evicted.append(key)

    def take_evicted(self) -> tuple[bytes, ...]:
        """What was evicted since the last call."""
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def check(self) -> None:
        """Assert what must always hold."""
        assert self.used == sum(self.size_of.values()) <= self.capacity, f"{self.used} of {self.capacity} are used"
        assert self._idle_size == sum(self.size_of[key] for key in self._idle), "idle embeddings are miscounted"
        assert set(self.size_of) == set(self.references) | set(self._idle), "an item is neither held nor idle"
        assert not set(self.references) & set(self._idle), "an item is both held and idle"
        assert all(count > 0 for count in self.references.values()), "an item has no references but counts as held"
        assert self._keep or not self._idle, "an item stays although nobody holds it"


class Items:
    """The hooks of the scheduler for requests with items."""

    def __init__(self, capacity: int, budget: int, *, shared: bool = True, whole_prompts: bool = False):
        """Capacity in embeddings, budget in tokens a step.

        Without `shared` each request encodes its items for itself and keeps nothing, as V0 did. With `whole_prompts` a
        prompt is computed in one step, and needs all its items in it.
        """
        self.cache = EncoderCache(capacity, keep=shared)
        self._budget = budget
        self._shared = shared
        self._whole_prompts = whole_prompts
        self._held: dict[int, dict[int, bytes]] = {}  # by handle: item, key
        self._encode: dict[bytes, tuple[Request, int]] = {}  # in the coming step: who needs it, which of its items
        self._passed: list[bytes] = []  # references that end with the coming step
        self._lengths: dict[bytes, tuple[int, int]] = {}  # by hash: of the items of all requests, and how many they are

    @classmethod
    def of(cls, config: ResolvedConfig) -> "Items":
        return cls(
            config.encoder_cache_tokens or config.max_num_batched_tokens,
            config.max_num_batched_tokens,
            shared="no-encoder-cache" not in config.removals,
            whole_prompts="no-chunking" in config.removals,
        )

    def refusal(self, request: Request) -> str | None:
        """Why a request's items can't be served; None if they can."""
        end = 0
        for index, item in enumerate(request.message.items):
            if item.offset < end or item.length < 1 or item.offset + item.length > request.prompt_len:
                return (
                    f"item {index} claims tokens {item.offset} to {item.offset + item.length - 1}: items must follow "
                    f"each other within the prompt of {request.prompt_len} tokens"
                )
            end = item.offset + item.length
            if item.length > self.cache.capacity:
                return (
                    f"item {index} has {item.length} embeddings, the encoder cache has room for "
                    f"{self.cache.capacity} (--max-num-batched-tokens)"
                )
            if item.bidirectional and item.length > self._budget:
                return (
                    f"item {index} spans {item.length} tokens that must be computed in one step, which computes at "
                    f"most {self._budget} (--max-num-batched-tokens)"
                )
        total = sum({self._key(request, n): item.length for n, item in enumerate(request.message.items)}.values())
        if self._whole_prompts and total > self.cache.capacity:
            return (
                f"the items have {total} embeddings; without chunking all are needed in one step, and the encoder "
                f"cache has room for {self.cache.capacity} (--max-num-batched-tokens)"
            )
        return None

    def enter(self, request: Request) -> str | None:
        """Count a request's items until `leave`; why it can't be served beside the others instead.

        Whoever shares embeddings under one hash must agree on how many they are.
        """
        if not self._shared:
            return None
        items, mine = request.message.items, dict[bytes, int]()
        for index, item in enumerate(items):
            length, _ = self._lengths.get(item.hash, (mine.setdefault(item.hash, item.length), 0))
            if length != item.length:
                return f"item {index} has {item.length} embeddings, another one with the same hash has {length}"
        for item in items:
            self._lengths[item.hash] = item.length, self._lengths.get(item.hash, (0, 0))[1] + 1
        return None

    def leave(self, request: Request) -> None:
        """A request that entered ends."""
        for item in request.message.items if self._shared else ():
            length, count = self._lengths.pop(item.hash)
            if count > 1:
                self._lengths[item.hash] = length, count - 1

    def clip(self, request: Request, start: int, count: int) -> int:
        """How many of the tokens from `start` on, at most `count`, can be computed in the coming step.

        It ends before the first item whose embeddings can't be there, or that would be split and mustn't be.
        """
        held = self._held.get(request.handle, {})
        wanted: dict[bytes, int] = {}  # nobody holds them yet
        for index, item in _within(request.message.items, start, start + count):
            split = item.bidirectional and item.offset + item.length > start + count
            key = self._key(request, index)
            if index not in held and key not in self.cache.references:
                wanted[key] = item.length
            if split or not self.cache.fits(sum(wanted.values())):
                return max(item.offset - start, 0)
        return count

    def reserve(self, request: Request, start: int, count: int) -> None:
        """The coming step computes these tokens, as many as `clip` allowed: their items are encoded and held."""
        held = self._held.setdefault(request.handle, {})
        needed = [
            (index, self._key(request, index)) for index, _ in _within(request.message.items, start, start + count)
        ]
        # Those that are there come first, lest they be evicted for the others.
        for index, key in sorted(needed, key=lambda one: one[1] not in self.cache.size_of):
            if index not in held:
                held[index] = key
                if self.cache.hold(key, request.message.items[index].length):
                    self._encode[key] = request, index

    def computed(self, request: Request, position: int) -> None:
        """All tokens below `position` are computed with the coming step: items that end there aren't needed after."""
        held = self._held.get(request.handle, {})
        items = request.message.items
        for index in [n for n in held if items[n].offset + items[n].length <= position]:
            # Until the step's message is made, nothing else of that step may take the place.
            self._passed.append(held.pop(index))
        if not held:
            self._held.pop(request.handle, None)

    def release(self, request: Request) -> None:
        """A request ends or is preempted; never between the planning of its chunk and the step's message."""
        assert all(owner is not request for owner, _ in self._encode.values()), (
            f"request {request.handle} is released from a step that encodes an item for it"
        )
        for key in self._held.pop(request.handle, {}).values():
            self.cache.drop(key)

    def take_changes(self) -> tuple[tuple[tuple[int, int], ...], tuple[bytes, ...]]:
        """For the step's message: (row, item) to encode in it, and keys to free before that."""
        encode = tuple((request.row, index) for request, index in self._encode.values())
        evicted = self.cache.take_evicted()
        self._encode = {}
        for key in self._passed:
            self.cache.drop(key)
        self._passed = []
        return encode, evicted

    def named(self, request: Request) -> tuple[ItemRef, ...]:
        """A request's items for the workers, each under the key that its embeddings are kept by."""
        items = request.message.items
        if self._shared or not items:
            return items
        return tuple(
            ItemRef(self._key(request, n), item.offset, item.length, item.bidirectional) for n, item in enumerate(items)
        )

    def _key(self, request: Request, index: int) -> bytes:
        name = request.message.items[index].hash
        if self._shared:
            return name
        return name + request.handle.to_bytes(8, "little") + index.to_bytes(4, "little")

    def check(self, requests: Sequence[Request]) -> None:
        """Assert that references are those of the requests that have a row, all of them between steps."""
        self.cache.check()
        assert not self._encode, "what a step encodes was not taken"
        assert not self._passed, "references that ended with a step were not dropped"
        counted: dict[bytes, int] = {}
        for held in self._held.values():
            for key in held.values():
                counted[key] = counted.get(key, 0) + 1
        assert counted == self.cache.references, "references don't match what requests hold"
        assert set(self._held) <= {request.handle for request in requests}, "a request without a row holds items"


def _within(items: Sequence[ItemRef], start: int, end: int) -> Iterator[tuple[int, ItemRef]]:
    """Items with a placeholder in [start, end)."""
    for index, item in enumerate(items):
        if item.offset >= end:
            return
        if item.offset + item.length > start:
            yield index, item
