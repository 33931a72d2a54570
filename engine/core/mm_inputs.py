"""Multimodal inputs in the scheduler: which are encoded in the next step, and whose embeddings stay on the device.

An input (image, audio, video) is a range of placeholder tokens in a prompt, one per embedding. A step that computes any
placeholder needs all embeddings of the input. An input is therefore encoded as a whole, at the latest in the step that
computes its first placeholder. Its embeddings stay until its last placeholder is computed, over any number of chunks.

    num_schedulable_tokens() ─► schedule_inputs() ─► free_passed_inputs()     for each chunk of a request with inputs
    take_step_changes()                                                       once per step, for its message
    failures() ─► confirm()                                                   with the result of a step that encodes
    free_request()                                                            when a request loses its slot

A request only references inputs that it has begun to compute. It can always finish those, so a request that waits for
space in the encoder cache gets it eventually.

Example: a prompt of 10 tokens with an input A at offset 3 and length 4, in chunks of 5 tokens:

    chunk             placeholders  encoded  references after scheduling
    tokens 0 to 4     3, 4          A        A
    tokens 5 to 9     5, 6                   none: A may be evicted after this step, or reused by its hash
"""

from collections.abc import Iterator, Sequence

import msgspec

from engine.core.hashing import joint_range
from engine.core.request import Request
from engine.core.unconfirmed_inputs import UnconfirmedInputs
from engine.messages import MMInputRef
from engine.resolved_config import ResolvedConfig


class EncoderCache:
    """The embeddings on the device, by key. Unreferenced ones are evicted when space is needed, oldest first."""

    def __init__(self, capacity: int, keep_unreferenced: bool = True):
        """`capacity` is in embeddings. Without `keep_unreferenced`, an input is evicted with its last reference."""
        self.capacity = capacity
        self.num_used = 0  # embeddings on the device
        self.size_of: dict[bytes, int] = {}
        self.references: dict[bytes, int] = {}
        self._keep_unreferenced = keep_unreferenced
        self._unreferenced: dict[bytes, None] = {}  # in the order of eviction
        self._num_unreferenced = 0  # embeddings
        self._evicted: list[bytes] = []

    def can_allocate(self, size: int) -> bool:
        """Whether unreferenced inputs with `size` embeddings in total could be referenced now."""
        return size <= self.capacity - self.num_used + self._num_unreferenced

    def acquire(self, key: bytes, size: int) -> bool:
        """Take a reference; True if the input isn't on the device and must be encoded."""
        known = self.size_of.get(key)
        if key in self.references:
            assert known == size, f"an input of {size} embeddings has the key of one of {known} that is in use"
            self.references[key] += 1
            return False
        if known not in (None, size):  # the key now identifies other content
            self._evict_unreferenced(key)
            known = None
        assert self.can_allocate(size), (
            f"{size} embeddings are requested, {self.capacity - self.num_used + self._num_unreferenced} fit"
        )
        self.references[key] = 1
        if known is not None:
            del self._unreferenced[key]
            self._num_unreferenced -= size
            return False
        while self.num_used + size > self.capacity:
            self._evict_unreferenced(next(iter(self._unreferenced)))
        self.size_of[key] = size
        self.num_used += size
        return True

    def release(self, key: bytes) -> None:
        """Drop a reference."""
        self.references[key] -= 1
        if self.references[key]:
            return
        del self.references[key]
        if self._keep_unreferenced:
            self._unreferenced[key] = None
            self._num_unreferenced += self.size_of[key]
        else:
            self._evict(key)

    def drop(self, key: bytes) -> None:
        """Evict an input that nothing references, if it is here."""
        if key in self._unreferenced:
            self._evict_unreferenced(key)

    def _evict_unreferenced(self, key: bytes) -> None:
        del self._unreferenced[key]
        self._num_unreferenced -= self.size_of[key]
        self._evict(key)

    def _evict(self, key: bytes) -> None:
        self.num_used -= self.size_of.pop(key)
        self._evicted.append(key)

    def take_evicted(self) -> tuple[bytes, ...]:
        """The keys evicted since the last call."""
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def check(self) -> None:
        """Assert the invariants."""
        keys, unreferenced = set(self.size_of), set(self._unreferenced)
        assert self.num_used == sum(self.size_of.values()) <= self.capacity, f"{self.num_used} of {self.capacity} used"
        assert self._num_unreferenced == sum(self.size_of[key] for key in unreferenced), "unreferenced are miscounted"
        assert keys == set(self.references) | unreferenced, "an input is neither referenced nor unreferenced"
        assert not set(self.references) & unreferenced, "an input is both referenced and unreferenced"
        assert all(count > 0 for count in self.references.values()), "an input has no references but counts as in use"
        assert self._keep_unreferenced or not unreferenced, "an input stays without references"


class EncoderCacheManager:
    """Decides when the multimodal inputs of requests are encoded, and references their embeddings."""

    def __init__(self, capacity: int, budget: int, *, shared: bool = True, whole_prompts: bool = False):
        """`budget` is in tokens per step. With `shared`, requests with equal inputs share their embeddings."""
        self.cache = EncoderCache(capacity, keep_unreferenced=shared)
        self._budget = budget
        self._shared = shared
        self._whole_prompts = whole_prompts
        self._held: dict[int, dict[int, bytes]] = {}  # by handle and number of the input, since it has a slot
        self._to_encode: dict[bytes, tuple[Request, int]] = {}  # in the next step: a request and number of its input
        self._passed: list[bytes] = []  # references that end with the next step
        self.queries = self.hits = 0  # inputs that a request began to compute; of them, those that were on the device
        self._registered: dict[bytes, tuple[int, int]] = {}  # by hash: length, and how many inputs of all requests
        self._unconfirmed = UnconfirmedInputs()

    @classmethod
    def from_resolved(cls, config: ResolvedConfig) -> "EncoderCacheManager":
        return cls(
            config.encoder_cache_tokens or config.max_num_batched_tokens,
            config.max_num_batched_tokens,
            shared="no-encoder-cache" not in config.ablations,
            whole_prompts="no-chunking" in config.ablations,
        )

    def placeholder_error(self, request: Request) -> str | None:
        """Why a request's inputs can't be served, even if nothing else runs; None if they can."""
        end = 0
        for index, mm_input in enumerate(request.message.mm_inputs):
            if (
                mm_input.offset < end
                or mm_input.length < 1
                or mm_input.offset + mm_input.length > request.num_prompt_tokens
            ):
                return (
                    f"multimodal input {index} claims tokens {mm_input.offset} to "
                    f"{mm_input.offset + mm_input.length - 1}: inputs must follow each other within the prompt of "
                    f"{request.num_prompt_tokens} tokens"
                )
            end = mm_input.offset + mm_input.length
            if mm_input.length > self.cache.capacity:
                return (
                    f"multimodal input {index} has {mm_input.length} embeddings, the encoder cache has room for "
                    f"{self.cache.capacity} (--max-num-batched-tokens)"
                )
            if mm_input.bidirectional and mm_input.length > self._budget:
                return (
                    f"multimodal input {index} spans {mm_input.length} tokens that must be computed in one step, which "
                    f"computes at most {self._budget} (--max-num-batched-tokens)"
                )
        sizes = {self._cache_key(request, n): mm_input.length for n, mm_input in enumerate(request.message.mm_inputs)}
        total = sum(sizes.values())
        if (joint := joint_range(request.message.mm_inputs)) is not None:
            return self._joint_error(joint[1] - joint[0], len(request.message.mm_inputs), total)
        if self._whole_prompts and total > self.cache.capacity:
            return (
                f"the multimodal inputs have {total} embeddings; without chunking all are needed in one step, and the "
                f"encoder cache has room for {self.cache.capacity} (--max-num-batched-tokens)"
            )
        return None

    def _joint_error(self, tokens: int, count: int, embeddings: int) -> str | None:
        """Why inputs that attend to each other can't be computed in one step; None if they can."""
        if tokens > self._budget:
            return (
                f"the {count} multimodal inputs span {tokens} tokens: they attend to each other, so they must be "
                f"computed in one step, which computes at most {self._budget} (--max-num-batched-tokens)"
            )
        if embeddings > self.cache.capacity:
            return (
                f"the {count} multimodal inputs have {embeddings} embeddings: they attend to each other, so all are "
                f"needed in one step, and the encoder cache has room for {self.cache.capacity} "
                "(--max-num-batched-tokens)"
            )
        return None

    def register(self, request: Request) -> str | None:
        """Count a request's inputs until `unregister`; returns an error if one of them contradicts another request.

        Inputs that share embeddings under one hash must have the same number of them.
        """
        if not self._shared:
            return None
        mm_inputs, own = request.message.mm_inputs, dict[bytes, int]()
        for index, mm_input in enumerate(mm_inputs):
            length, _ = self._registered.get(mm_input.hash, (own.setdefault(mm_input.hash, mm_input.length), 0))
            if length != mm_input.length:
                return (
                    f"multimodal input {index} has {mm_input.length} embeddings, another one with the same hash has "
                    f"{length}"
                )
        for mm_input in mm_inputs:
            self._registered[mm_input.hash] = mm_input.length, self._registered.get(mm_input.hash, (0, 0))[1] + 1
        return None

    def unregister(self, request: Request) -> int | None:
        """A registered request ends. Returns the position from which its blocks can't be reused; None: all can."""
        for mm_input in request.message.mm_inputs if self._shared else ():
            length, count = self._registered.pop(mm_input.hash)
            if count > 1:
                self._registered[mm_input.hash] = length, count - 1
        return self._unconfirmed.leave(request)

    def num_schedulable_tokens(self, request: Request, start: int, count: int) -> int:
        """How many of the `count` tokens from position `start` on the next step can compute.

        They end before the first input whose embeddings don't fit into the cache, or before a bidirectional input that
        would be split. Joint inputs are like one input.
        """
        joint = joint_range(request.message.mm_inputs)
        if joint is not None and joint[0] < start + count < joint[1]:
            return max(joint[0] - start, 0)
        held = self._held.get(request.handle, {})
        new: dict[bytes, int] = {}  # sizes of inputs that nothing references yet
        for index, mm_input in _overlapping(request.message.mm_inputs, start, start + count):
            split = mm_input.bidirectional and mm_input.offset + mm_input.length > start + count
            key = self._cache_key(request, index)
            if index not in held and key not in self.cache.references:
                new[key] = mm_input.length
            if split or not self.cache.can_allocate(sum(new.values())):
                return max((joint[0] if joint else mm_input.offset) - start, 0)
        return count

    def schedule_inputs(self, request: Request, start: int, count: int) -> None:
        """Reference the inputs of a scheduled chunk, and encode in this step those that aren't on the device.

        `count` is at most what `num_schedulable_tokens` allowed.
        """
        # With its first chunk, a request also begins to use what it found in the prefix cache.
        first = start if request.handle in self._held else 0
        held = self._held.setdefault(request.handle, {})
        needed = [
            (index, self._cache_key(request, index))
            for index, _ in _overlapping(request.message.mm_inputs, start, start + count)
        ]
        # Cached inputs are referenced first, so that the others don't evict them.
        for index, key in sorted(needed, key=lambda one: one[1] not in self.cache.size_of):
            if index not in held:
                held[index] = key
                self.queries += 1
                if self.cache.acquire(key, request.message.mm_inputs[index].length):
                    self._to_encode[key] = request, index
                    self._unconfirmed.add(request.message.mm_inputs[index].hash)
                else:
                    self.hits += 1
        self._unconfirmed.use(request, first, start + count)

    def free_passed_inputs(self, request: Request, position: int) -> None:
        """Drop the references to inputs that end before `position`, where the next step ends."""
        held = self._held.get(request.handle, {})
        mm_inputs = request.message.mm_inputs
        for index in [n for n in held if mm_inputs[n].offset + mm_inputs[n].length <= position]:
            # Kept until the step's message is built, so that nothing else in that step takes the space.
            self._passed.append(held.pop(index))

    def free_request(self, request: Request) -> None:
        """Drop the references of a request that ends or is preempted; not while its chunk is being scheduled."""
        assert all(owner is not request for owner, _ in self._to_encode.values()), (
            f"request {request.handle} is freed in a step that encodes an input for it"
        )
        for key in self._held.pop(request.handle, {}).values():
            self.cache.release(key)

    def take_step_changes(self) -> tuple[tuple[tuple[int, int], ...], tuple[bytes, ...]]:
        """For the step's message: the inputs to encode, as (slot, number of the input), and the keys to free before."""
        to_encode = tuple((request.slot, index) for request, index in self._to_encode.values())
        self._unconfirmed.end_step()
        evicted = self.cache.take_evicted()
        self._to_encode = {}
        for key in self._passed:
            self.cache.release(key)
        self._passed = []
        return to_encode, evicted

    def failures(self, errors: Sequence[str]) -> dict[int, str]:
        """The requests to end, by handle and with the cause, because their inputs could not be encoded.

        `errors` are those of the oldest step in flight that encodes inputs; empty: another step has returned.
        """
        return self._unconfirmed.failures(errors) if errors else {}

    def confirm(self, errors: Sequence[str]) -> None:
        """The requests of `failures` have ended: what could not be encoded is not in the cache any longer."""
        for content, error in zip(self._unconfirmed.confirm(), errors, strict=True) if errors else ():
            if error:
                self.cache.drop(content)

    def refs_for_workers(self, request: Request) -> tuple[MMInputRef, ...]:
        """A request's inputs with the keys of the encoder cache as their hashes."""
        mm_inputs = request.message.mm_inputs
        if self._shared or not mm_inputs:
            return mm_inputs
        return tuple(
            msgspec.structs.replace(mm_input, hash=self._cache_key(request, n)) for n, mm_input in enumerate(mm_inputs)
        )

    def _cache_key(self, request: Request, index: int) -> bytes:
        content = request.message.mm_inputs[index].hash
        if self._shared:
            return content
        return content + request.handle.to_bytes(8, "little") + index.to_bytes(4, "little")

    def check(self, requests: Sequence[Request]) -> None:
        """Assert between steps that all references are those of `requests`, which have a slot."""
        self.cache.check()
        assert not self._to_encode, "what a step encodes was not taken"
        assert not self._passed, "references that ended with a step were not dropped"
        counted: dict[bytes, int] = {}
        for held in self._held.values():
            for key in held.values():
                counted[key] = counted.get(key, 0) + 1
        assert counted == self.cache.references, "references don't match what requests hold"
        assert set(self._held) <= {request.handle for request in requests}, "a request without a slot holds inputs"


def _overlapping(mm_inputs: Sequence[MMInputRef], start: int, end: int) -> Iterator[tuple[int, MMInputRef]]:
    """The inputs with a placeholder in [start, end), with their numbers."""
    for index, mm_input in enumerate(mm_inputs):
        if mm_input.offset >= end:
            return
        if mm_input.offset + mm_input.length > start:
            yield index, mm_input
