"""The feature files that front ends have handed to this core: what each front end's cache believes is here.

A front end links a file into the core's folder and sends its path with the first request that uses it. Later requests
name only the hash. When the front end evicts the input it sends FreeFeatures, before any request that would need the
file again. The front end alone decides, so the mirror can't drift: a hash without a file is an error of this software,
which ends the request and is counted.

A file is unlinked once its front end has evicted it, no live request needs it, and every step that was submitted by
then has been computed, since a worker may still read it for a request that was aborted.
"""

import os
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from engine.core.mm_inputs import EncoderCacheManager
from engine.errors import RedlineError
from engine.messages import AddRequest, FreeFeatures, MMInputRef, front_end_of
from engine.multimodal.feature_files import unlink_features
from engine.stats import MMStats


class MirrorMissError(RedlineError):
    """A front end counts on a feature file that is not here."""


class _Link:
    """A feature file of the core."""

    __slots__ = ("evicted", "handle", "path", "size", "users")

    def __init__(self, handle: int, path: str, size: int):
        self.handle = handle  # of the request that brought it
        self.path = path
        self.size = size
        self.users = 0  # live requests, once for each time they contain the input
        self.evicted = False


class FeatureMirror:
    """The feature files of one core; for its loop."""

    def __init__(self, folder: str = "", unlink: Callable[[str], None] = unlink_features):
        """`folder` is the core's, if the model takes inputs; `unlink` removes a file in it."""
        self.folder = folder
        self._unlink = unlink
        self._links: dict[tuple[int, bytes], _Link] = {}  # by front end and hash: what it has not evicted
        self._held: dict[int, list[_Link]] = {}  # by handle of a live request
        self._unneeded: list[_Link] = []  # since the last `unlink_unneeded`
        self._waiting: deque[tuple[int, _Link]] = deque()  # with the last step that was submitted before
        self.queries = self.hits = self.misses = 0
        self.bytes = 0  # of all files that have not been unlinked

    def add(self, message: AddRequest) -> AddRequest:
        """Hold the files of a request until `release`; returns the request with all paths.

        Raises MirrorMissError if one is not here. The other files are registered, but not held, in that case.
        """
        if message.handle in self._held:  # it waited for an adapter
            return message
        front_end = front_end_of(message.handle)
        found = [self._find(front_end, message.handle, mm_input) for mm_input in message.mm_inputs]
        links = [link for link in found if link is not None]
        if len(links) < len(found):
            self.misses += len(found) - len(links)
            missing = message.mm_inputs[found.index(None)]
            raise MirrorMissError(
                f"the features of multimodal input {missing.hash.hex()} are not in the engine although its API process "
                "has sent them; please report this, and send the request again"
            )
        self._hold(message.handle, links)
        return _with_paths(message, links)

    def _find(self, front_end: int, handle: int, mm_input: MMInputRef) -> _Link | None:
        """The file of an input, registered if it comes with the request."""
        self.queries += 1
        key = front_end, mm_input.hash
        if not mm_input.features:
            link = self._links.get(key)
            self.hits += link is not None
            return link
        link = self._open(handle, mm_input.features)
        if link is not None:
            if key in self._links:  # sent again although it is here
                self._evict(key)
            self._links[key] = link
        return link

    def hold_own(self, handle: int, paths: Sequence[str]) -> None:
        """Hold files of one request that no other may use."""
        links = [link for path in paths if (link := self._open(handle, path)) is not None]
        for link in links:
            link.evicted = True
        self._hold(handle, links)

    def _open(self, handle: int, path: str) -> _Link | None:
        try:
            size = os.stat(path).st_size
        except OSError:
            return None
        self.bytes += size
        return _Link(handle, path, size)

    def _hold(self, handle: int, links: list[_Link]) -> None:
        self._held[handle] = links
        for link in links:
            link.users += 1

    def holds(self, handle: int) -> bool:
        return handle in self._held

    def release(self, handle: int) -> None:
        """A request has ended, or was never queued."""
        for link in self._held.pop(handle, ()):
            link.users -= 1
            if link.evicted and not link.users:
                self._unneeded.append(link)

    def free(self, message: FreeFeatures) -> None:
        """A front end has evicted inputs."""
        for content in message.hashes:
            key = front_end_of(message.sender), content
            if key in self._links:
                self._evict(key)
            else:
                self.misses += 1

    def reject(self, message: AddRequest) -> None:
        """A request arrives late from a front end that is gone: its files are unlinked."""
        paths = [mm_input.features for mm_input in message.mm_inputs if mm_input.features]
        self.hold_own(message.handle, paths)
        self.release(message.handle)

    def drop_stale(self, is_stale: Callable[[int], bool]) -> None:
        """A front end is gone, and its successor begins with an empty cache.

        `is_stale` is whether a handle is from a front end that is gone. Its file may have no request yet.
        """
        for key in [key for key, link in self._links.items() if is_stale(link.handle)]:
            self._evict(key)
        known = {link.path for links in self._held.values() for link in links}
        known |= {link.path for link in [*self._unneeded, *(link for _, link in self._waiting)]}
        for name in os.listdir(self.folder) if self.folder else ():
            handle, _, _ = name.partition("-")
            path = os.path.join(self.folder, name)
            if handle.isdecimal() and is_stale(int(handle)) and path not in known:
                self._unlink(path)

    def _evict(self, key: tuple[int, bytes]) -> None:
        link = self._links.pop(key)
        link.evicted = True
        if not link.users:
            self._unneeded.append(link)

    @property
    def has_unneeded(self) -> bool:
        return bool(self._unneeded or self._waiting)

    def unlink_unneeded(self, submitted: int, finished: int) -> None:
        """Unlink files that nothing needs. Args: numbers of the last step submitted, and of the last one finished."""
        self._waiting.extend((submitted, link) for link in self._unneeded)
        self._unneeded.clear()
        while self._waiting and self._waiting[0][0] <= finished:
            _, link = self._waiting.popleft()
            self.bytes -= link.size
            self._unlink(link.path)

    def stats(self, encoder: EncoderCacheManager) -> MMStats | None:
        """Counters of mirror and encoder cache; None if no request has had inputs."""
        if not (self.queries or encoder.queries):
            return None
        counters = self.queries, self.hits, self.misses, self.bytes
        return MMStats(*counters, encoder.queries, encoder.hits, encoder.cache.num_used)

    def check(self, handles: Sequence[int]) -> None:
        """Assert the invariants; `handles` are the live requests with files."""
        assert set(self._held) == set(handles), "files are held for other requests than those that live"
        counted: dict[int, int] = {}
        for links in self._held.values():
            for link in links:
                counted[id(link)] = counted.get(id(link), 0) + 1
        known = {id(link): link for link in self._links.values()}
        known |= {id(link): link for links in self._held.values() for link in links}
        for link in known.values():
            assert link.users == counted.get(id(link), 0), f"{link.path} counts {link.users} users"
            assert os.path.exists(link.path), f"{link.path} is needed but gone"
        leaving = [*self._unneeded, *(link for _, link in self._waiting)]
        assert all(link.evicted and not link.users for link in leaving), "a file is unlinked that is needed"
        total = sum(link.size for link in known.values()) + sum(link.size for link in leaving)
        assert self.bytes == total, f"{self.bytes} bytes are counted, {total} are here"


def _with_paths(message: AddRequest, links: Sequence[_Link]) -> AddRequest:
    pairs = zip(message.mm_inputs, links, strict=True)
    return msgspec.structs.replace(
        message, mm_inputs=tuple(msgspec.structs.replace(one, features=link.path) for one, link in pairs)
    )
