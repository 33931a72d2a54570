"""The feature cache of a front end: processed multimodal inputs by content hash, as files in shared memory.

The front end alone decides what is evicted. It knows which files each core has, and sends FreeFeatures for an evicted
input before any request that needs it again; nothing else may come between, so all of this is synchronous and on one
event loop. Inputs that a request still uses are not evicted, even if the cache exceeds its capacity meanwhile.
"""

import os
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from engine.columns import column
from engine.errors import ProcessingError
from engine.frontend.front_end_stats import MMCounters
from engine.messages import FreeFeatures, MMInputRef, UnplacedInput, make_handle
from engine.multimodal.feature_files import FeatureFolder, unlink_features
from engine.multimodal.pool_protocol import Done
from engine.multimodal.types import Media, MediaKind


class CachedInput:
    """An entry: a processed input and its file."""

    __slots__ = ("failed", "hash", "mirrors", "path", "processed", "users")

    def __init__(self, content: bytes, path: str, processed: Done):
        self.hash = content
        self.path = path
        self.processed = processed
        self.users = 0
        self.mirrors: set[int] = set()  # replicas whose core has the file
        self.failed = False  # a request with it: it is evicted as soon as no request uses it


class PreparedInput:
    """A processed input of a request. Its features stay in the cache until `release`, or as long as this object."""

    __slots__ = ("_cache", "_cached", "bidirectional", "joint", "kind")

    def __init__(
        self, cache: "FeatureCache", cached: CachedInput, kind: MediaKind, *, bidirectional: bool, joint: bool = False
    ):
        self._cache = cache
        self._cached: CachedInput | None = cached
        self.kind = kind
        self.bidirectional = bidirectional
        self.joint = joint
        cached.users += 1

    @property
    def cached(self) -> CachedInput:
        assert self._cached is not None, "the input was released"
        return self._cached

    @property
    def hash(self) -> bytes:
        return self.cached.hash

    @property
    def tokens(self) -> list[int]:
        """What replaces the placeholder in the prompt."""
        return self.cached.processed.tokens

    @property
    def before(self) -> str:
        """Text to insert before the placeholder, see `engine.multimodal.types.Processed`."""
        return self.cached.processed.before

    @property
    def after(self) -> str:
        return self.cached.processed.after

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.cached.processed.grid

    def ref_at(self, offset: int, features: str = "") -> MMInputRef:
        """The input as a part of a prompt; `offset`: of its first token."""
        processed = self.cached.processed
        return MMInputRef(
            self.hash, offset, len(processed.tokens), self.bidirectional, features, processed.grid,
            processed.seconds_per_frame, self.joint,
        )  # fmt: skip

    def release(self) -> None:
        """Allow that the features are evicted; safe to call twice."""
        if self._cached is not None:
            self._cache.release(self._cached)
            self._cached = None

    def __del__(self) -> None:
        if self._cached is not None:  # a request that was never sent
            self._cache.forgotten.append(self._cached)


class PlacedInput(NamedTuple):
    """An input in a prompt, at the position of its first token; -1 if the core replaces the placeholders."""

    offset: int
    input: PreparedInput


@dataclass(frozen=True, slots=True)
class RawInput:
    """An input that the core processes (`--ablate inline-processing`), which also replaces the placeholders."""

    media: Media
    count: int = 1  # inputs of this kind in the prompt
    options: Mapping[str, Any] = field(default_factory=dict)  # of the request, for the processor


PromptInputs: TypeAlias = Sequence[PlacedInput] | Sequence[RawInput]


def unplaced_inputs(inputs: PromptInputs) -> tuple[UnplacedInput, ...]:
    """The inputs of a prompt whose placeholders the core replaces, for its message."""
    return tuple(
        UnplacedInput(one.media.kind, data=one.media.data, count=one.count, options=dict(one.options))
        if isinstance(one, RawInput)
        else UnplacedInput(one.input.kind, column(one.input.tokens), one.input.before, one.input.after)
        for one in inputs
        if isinstance(one, RawInput) or one.offset < 0
    )


def placed_inputs(inputs: PromptInputs) -> list[PlacedInput]:
    """The inputs of a prompt that were processed here."""
    return [one for one in inputs if isinstance(one, PlacedInput)]


class CoreFiles(Protocol):
    """Reaches a core; see `engine.frontend.transport.Transport`."""

    def send(self, message: FreeFeatures) -> None:
        """Send a message before returning."""
        ...

    def hand_over(self, path: str, new: str) -> None: ...

    def take_back(self, new: str) -> None: ...


class _Mirror(NamedTuple):
    folder: str  # of the core
    core: CoreFiles


class FeatureCache:
    """Processed inputs, least recently used first, with at most `capacity` bytes that no request uses."""

    def __init__(self, capacity: int, counters: MMCounters, front_end: int = 0, first_sequence: int = 1):
        """`counters` are shown by /metrics. Other arguments as of `engine.frontend.connect.connect`."""
        self.capacity = capacity
        self.forgotten: deque[CachedInput] = deque()  # of PreparedInputs that were not released; from any thread
        self._counters = counters
        self._sender = make_handle(front_end, first_sequence)
        self._folder = FeatureFolder()
        self._by_hash: dict[bytes, CachedInput] = {}
        self._unused: OrderedDict[bytes, CachedInput] = OrderedDict()  # least recently used first
        self._mirrors: dict[int, _Mirror] = {}  # by replica
        self._files = 0
        self._bytes = 0

    # ----------------------------------------------------------------------------------------------------- the cores

    def attach(self, replica: int, folder: str, core: CoreFiles) -> None:
        """Add the core of a replica, and the folder of its files on its machine."""
        self._mirrors[replica] = _Mirror(folder, core)

    def detach(self, replica: int) -> None:
        """The core is gone, and all that it had."""
        self._mirrors.pop(replica, None)
        for cached in self._by_hash.values():
            cached.mirrors.discard(replica)

    def refs_for(self, replica: int, handle: int, placed: Sequence[PlacedInput]) -> tuple[MMInputRef, ...]:
        """The inputs of a request that is sent to a replica in the same section; it is given what it lacks."""
        refs, mirror = [], self._mirrors[replica]
        for index, (offset, prepared) in enumerate(placed):
            cached, features = prepared.cached, ""
            if replica not in cached.mirrors:
                features = os.path.join(mirror.folder, f"{handle}-{index}")
                try:
                    mirror.core.hand_over(cached.path, features)
                except OSError as error:  # the core is gone, and this process does not know yet
                    raise ProcessingError(f"the features of an input can't be handed to the engine: {error}") from error
                cached.mirrors.add(replica)
            refs.append(prepared.ref_at(offset, features))
        return tuple(refs)

    def withdraw(self, replica: int, refs: Iterable[MMInputRef]) -> None:
        """A request could not be sent: the files for it are not the core's."""
        for ref in refs:
            if ref.features:
                self._mirrors[replica].core.take_back(ref.features)
                self._by_hash[ref.hash].mirrors.discard(replica)

    def send_again(self, replica: int, placed: Iterable[PlacedInput]) -> None:
        """A core failed to serve a request: its inputs are evicted, so that a retry gets them anew."""
        failed = {one.input.cached.hash: one.input.cached for one in placed}
        for cached in failed.values():
            cached.failed = True
        self._free(replica, [cached for cached in failed.values() if replica in cached.mirrors])

    # ------------------------------------------------------------------------------------------------------- entries

    def find(self, content: bytes, *, known: bool = True) -> CachedInput | None:
        """The entry of a hash, to be used before anything else runs. Without `known` the lookup finds nothing."""
        self._counters.add("queries")
        cached = self._by_hash.get(content) if known else None
        if cached is not None:
            self.count_hit()
        return cached

    def count_hit(self) -> None:
        """An input was looked up that is processed just now."""
        self._counters.add("hits")

    def use(self, cached: CachedInput, kind: MediaKind, *, bidirectional: bool, joint: bool = False) -> PreparedInput:
        """Keep an entry for a request."""
        self._unused.pop(cached.hash, None)
        return PreparedInput(self, cached, kind, bidirectional=bidirectional, joint=joint)

    def new_path(self) -> str:
        """The path of a new file, for the process that writes it."""
        self._files += 1
        return os.path.join(self._folder.path, str(self._files))

    def insert(self, content: bytes, path: str, processed: Done) -> CachedInput:
        """Add a processed input; if the hash is known by now, that entry is returned and the file is unlinked."""
        cached = self._by_hash.get(content)
        if cached is not None:
            unlink_features(path)
            return cached
        cached = self._by_hash[content] = self._unused[content] = CachedInput(content, path, processed)
        self._bytes += processed.size
        self._collect_forgotten()
        self._evict(keep=cached)
        return cached

    def release(self, cached: CachedInput) -> None:
        """A request does not use an entry any longer."""
        self._drop_user(cached)
        self._collect_forgotten()
        self._evict()

    def _collect_forgotten(self) -> None:
        while self.forgotten:
            self._drop_user(self.forgotten.popleft())

    def _drop_user(self, cached: CachedInput) -> None:
        cached.users -= 1
        if not cached.users and self._by_hash.get(cached.hash) is cached:
            self._unused[cached.hash] = cached
            if cached.failed:
                self._unused.move_to_end(cached.hash, last=False)

    def _evict(self, keep: CachedInput | None = None) -> None:
        """Evict entries that no request uses until the rest fits, and free them in all cores that have them."""
        evicted = []
        while self._unused:
            content, cached = next(iter(self._unused.items()))
            if not cached.failed and (self._bytes <= self.capacity or cached is keep):  # keep: it is used next
                break
            del self._unused[content], self._by_hash[content]
            self._bytes -= cached.processed.size
            unlink_features(cached.path)
            evicted.append(cached)
        self._counters.set("bytes", self._bytes)
        for replica in self._mirrors if evicted else ():
            self._free(replica, [cached for cached in evicted if replica in cached.mirrors])

    def _free(self, replica: int, evicted: Sequence[CachedInput]) -> None:
        if evicted:
            for cached in evicted:
                cached.mirrors.discard(replica)
            self._mirrors[replica].core.send(FreeFeatures(self._sender, tuple(cached.hash for cached in evicted)))

    def clear(self) -> None:
        """Evict all entries that no request uses."""
        capacity, self.capacity = self.capacity, -1
        self._collect_forgotten()
        self._evict()
        self.capacity = capacity

    def close(self) -> None:
        """Remove all files."""
        self._folder.remove()

    def check(self) -> None:
        """Assert the invariants."""
        self._collect_forgotten()
        self._evict()
        assert self._bytes == sum(one.processed.size for one in self._by_hash.values()), "bytes are miscounted"
        for content, cached in self._by_hash.items():
            assert cached.hash == content, "an entry has another hash"
            assert cached.users >= 0, "an entry was released too often"
            assert (cached.users == 0) == (content in self._unused), "an entry is both used and unused"
            assert os.path.exists(cached.path), f"{cached.path} is gone"
            assert cached.mirrors <= self._mirrors.keys(), "a core that is gone counts as having a file"
        assert self._unused.keys() <= self._by_hash.keys(), "an evicted entry is still listed"
        assert self._bytes <= self.capacity or not self._unused, "the cache is too large"
