"""Prepares the multimodal inputs of requests: feature cache first, then the pool of processes.

    prepare() ─► content hash ─► FeatureCache ──miss──► MediaPool ─► FeatureCache
                                     └── PreparedInput ◄────────────────┘

Equal inputs that arrive while one of them is processed wait for it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from engine.config import NO_FEATURE_CACHE, EngineConfig
from engine.errors import RequestError, SharedMemoryFullError
from engine.frontend.feature_cache import CachedInput, FeatureCache, PreparedInput
from engine.frontend.front_end_stats import MMCounters
from engine.host import cores
from engine.media.limits import MediaLimits
from engine.messages import MMSpec
from engine.multimodal.families import MM_FAMILIES
from engine.multimodal.feature_files import cache_bytes
from engine.multimodal.hashing import InputHasher
from engine.multimodal.pool import MediaPool
from engine.multimodal.pool_protocol import Done, PoolOptions
from engine.multimodal.types import Media, MediaKind

# Cores of the machine for each process of the pool by default: most time passes in the model.
CORES_PER_PROCESS = 4
LARGE = 128 << 10  # bytes; larger inputs are hashed on a thread, so that streams continue meanwhile
PROCESSOR = "engine.processor_start:make"
MAX_PROCESSES = 16  # by default


class MMOptions(msgspec.Struct):
    """What the front ends of an engine must know to prepare inputs.

    Args:
        folder: of the model.
        model: the fields of the EngineConfig, for the pool's processes.
        processes: of the pools of all front ends.
        cache_bytes: of the feature caches of all front ends; 0: nothing is kept between requests.
        processor_options: `--mm-processor-kwargs`.
        limits: of decoding.
        factory: makes the processor, see `PoolOptions`.
    """

    folder: str
    model: dict[str, Any]
    processes: int
    cache_bytes: int
    processor_options: dict[str, Any] = {}
    limits: MediaLimits = MediaLimits()
    factory: str = PROCESSOR


def make_mm_options(config: EngineConfig) -> MMOptions:
    """The options of an engine's front ends; the model of `config` is a folder or its config.json."""
    path = Path(config.model)
    kwargs = config.mm_processor_kwargs or {}
    assert isinstance(kwargs, Mapping), "JSON text was parsed"
    default = min(MAX_PROCESSES, max(1, cores() // CORES_PER_PROCESS))
    return MMOptions(
        folder=str(path if path.is_dir() else path.parent),
        model=config.describe(),
        processes=config.mm_processors or default,
        cache_bytes=0 if NO_FEATURE_CACHE in config.ablations else cache_bytes(config.mm_cache_gb),
        processor_options=dict(kwargs),
        limits=config.media_options.limits,
    )


class Pool(Protocol):
    """The part of a MediaPool that the pipeline uses."""

    def open(self) -> None: ...

    async def started(self) -> None: ...

    async def submit(self, media: Media, count: int, options: Mapping[str, Any], path: str) -> Done: ...

    def close(self) -> None: ...


class MMPipeline:
    """The multimodal inputs of one front end; lives in one event loop."""

    def __init__(self, spec: MMSpec, cache: FeatureCache, pool: Pool, hasher: InputHasher, *, share: bool = True):
        """Make a pipeline; `open` starts its pool.

        Args:
            share: requests use the results of others; without, each input is processed anew.
        """
        self.spec = spec
        self.cache = cache
        self._pool = pool
        self._hasher = hasher
        self._share = share
        self._is_open = False
        self._in_progress: dict[bytes, _InProgress] = {}
        family = MM_FAMILIES.get(spec.family)
        self._bidirectional = family.bidirectional if family else ()
        self._joint = family is not None and bool(family.joint)

    @classmethod
    def make(
        cls,
        spec: MMSpec,
        options: MMOptions,
        counters: MMCounters,
        *,
        front_end: int = 0,
        front_ends: int = 1,
        first_sequence: int = 1,
    ) -> "MMPipeline":
        """The pipeline of one of several front ends, with its share of processes and memory.

        `front_end` and `first_sequence` as of `engine.frontend.connect.connect`.
        """
        cache = FeatureCache(options.cache_bytes // front_ends, counters, front_end, first_sequence)
        pool = PoolOptions(options.factory, options.model, options.limits)
        processes = max(1, options.processes // front_ends + (front_end < options.processes % front_ends))
        hasher = InputHasher(Path(options.folder), spec.family, options.processor_options)
        return cls(spec, cache, MediaPool(pool, processes, counters), hasher, share=options.cache_bytes > 0)

    def open(self) -> None:
        """Start the pool; called inside the event loop. The clients of several replicas share it."""
        if not self._is_open:
            self._is_open = True
            self._pool.open()

    async def started(self) -> None:
        """Wait until inputs are processed without waiting for the pool's start."""
        await self._pool.started()

    def close(self) -> None:
        """End the pool and remove all files."""
        self._pool.close()
        self.cache.close()

    async def prepare(self, media: Media, count: int = 1, options: Mapping[str, Any] | None = None) -> PreparedInput:
        """Process an input, or find its features in the cache.

        Args:
            count: number of inputs of its kind in the prompt.
            options: of the request, for the processor; they replace those of `--mm-processor-kwargs`.

        Raises:
            RequestError: the model can't take this input.
            ProcessingError: it could not be processed through no fault of its own.
        """
        self.check_kind(media.kind)
        given = options or {}
        if len(media.data) < LARGE:
            content = self._hasher.hash_input(media.kind, media.data, count, given)
        else:
            content = await asyncio.to_thread(self._hasher.hash_input, media.kind, media.data, count, given)
        cached = self.cache.find(content, known=self._share)
        if cached is not None:
            return self._use(cached, media.kind)
        if not self._share:
            return await self._process(content, media, count, given)
        job = self._in_progress.get(content)
        if job is None:
            job = self._in_progress[content] = _InProgress(self._process(content, media, count, given))
        else:
            self.cache.count_hit()
        try:
            async with job.result() as processed:
                return self._use(processed.cached, media.kind)
        finally:
            if self._in_progress.get(content) is job and not job.is_awaited:
                del self._in_progress[content]

    def _use(self, cached: CachedInput, kind: MediaKind) -> PreparedInput:
        return self.cache.use(cached, kind, bidirectional=kind in self._bidirectional, joint=self._joint)

    def check_kind(self, kind: MediaKind) -> None:
        """Raise RequestError for a kind that the model doesn't take."""
        if kind not in self.spec.placeholders:
            known = " and ".join(self.spec.placeholders)
            raise RequestError(f"the model takes no {kind} inputs, only {known} inputs")

    async def _process(self, content: bytes, media: Media, count: int, options: Mapping[str, Any]) -> PreparedInput:
        path, merged = self.cache.new_path(), self._hasher.options_of(options)
        try:
            done = await self._pool.submit(media, count, merged, path)
        except SharedMemoryFullError:  # other processes may have filled it
            self.cache.clear()
            done = await self._pool.submit(media, count, merged, path)
        return self._use(self.cache.insert(content, path, done), media.kind)


class _InProgress:
    """The processing of an input that several requests may wait for."""

    def __init__(self, processing: Coroutine[Any, Any, PreparedInput]):
        self.task = asyncio.ensure_future(processing)
        self._waiters = 0

    @property
    def is_awaited(self) -> bool:
        """Whether a request waits for it. Without one it is canceled, if it is not done."""
        return self._waiters > 0

    @contextlib.asynccontextmanager
    async def result(self) -> AsyncIterator[PreparedInput]:
        """The result, which stays in the cache within the context. If all that wait are canceled, so is the task."""
        self._waiters += 1
        try:
            yield await asyncio.shield(self.task)
        finally:
            self._waiters -= 1
            if not self._waiters:
                self._end()

    def _end(self) -> None:
        """Nobody waits any longer."""
        if not self.task.done():
            self.task.cancel()
        elif not self.task.cancelled() and self.task.exception() is None:
            self.task.result().release()
