"""API processes × replicas in one thread: real feature caches, routers, mirrors and cores; workers without a model.

The harness alone moves messages, steps cores and ends the processing of inputs, in an order that it draws.
"""

import asyncio
import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engine.clock import FakeClock
from engine.core.engine import EngineCore
from engine.core.feature_mirror import FeatureMirror
from engine.errors import EngineDeadError, ProcessingError, RedlineError
from engine.frontend.core_client import CoreClient
from engine.frontend.feature_cache import FeatureCache, PlacedInput
from engine.frontend.front_end_stats import MMCounters
from engine.frontend.mm_pipeline import MMPipeline
from engine.frontend.router import Router
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import collect_outputs
from engine.frontend.transport import LocalFiles
from engine.messages import MMInputRef, MMSpec, Ready, StepMessage, ToCore, encode
from engine.multimodal.feature_files import FeatureFolder, read_features, write_features
from engine.multimodal.hashing import InputHasher
from engine.multimodal.pool_protocol import Done
from engine.multimodal.types import Media
from tests.engine.core_driver import next_wait, resolved
from tests.engine.fake_executor import VOCABULARY, FakeExecutor, expected_tokens
from tests.engine.frontend.fleet import TOKENIZER

PLACEHOLDER, TOKENS = 7, 4  # of each input
GENERATION = 1 << 40


class Reader(FakeExecutor):
    """Reads the features of inputs as late as a worker may: when the result of their step is due."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._reading: deque[tuple[int, list[MMInputRef]]] = deque()  # by step
        self.pictures: dict[bytes, int] = {}  # by hash: what the file had

    def _apply(self, message: StepMessage) -> None:
        super()._apply(message)
        refs = [self.slots[slot].mm_inputs[index] for slot, index in message.encoder_inputs]
        self._reading.append((message.step, refs))

    def pump(self) -> None:
        while self._due and self._due[0][0] <= self._clock.now() and self._reading:
            step, refs = self._reading[0]
            if step > self._due[0][1]:
                break
            self._reading.popleft()
            for ref in refs:
                picture = int(read_features(ref.features)["picture"])
                assert self.pictures.setdefault(ref.hash, picture) == picture, "the file of another input"
        super().pump()


class Transport(LocalFiles):
    """Keeps the messages to a core until they are moved."""

    def __init__(self) -> None:
        self.messages: deque[bytes] = deque()
        self.deliver: Callable[[bytes], None] | None = None

    def open(self, deliver: Callable[[bytes], None]) -> None:
        self.deliver = deliver

    def send(self, message: ToCore) -> None:
        self.messages.append(encode(message))

    def close(self) -> None:
        self.deliver = None


class Pool:
    """Processes an input when the harness says so; its first byte is the picture."""

    def __init__(self, luck: random.Random, failures: float):
        self.waiting: list[asyncio.Future[None]] = []
        self.processed: list[int] = []
        self._luck = luck
        self._failures = failures

    def open(self) -> None: ...

    def close(self) -> None: ...

    async def submit(self, media: Media, _count: int, _options: Mapping[str, Any], path: str) -> Done:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append(future)
        await future
        picture = media.data[0]
        self.processed.append(picture)
        if self._luck.random() < self._failures:
            raise ProcessingError("the process died")
        size = write_features(path, {"picture": np.array(picture), "rest": np.zeros(100 * (1 + picture % 3))})
        return Done([PLACEHOLDER] * TOKENS, size=size)

    def work(self) -> bool:
        """End the processing of one input."""
        self.waiting = [one for one in self.waiting if not one.done()]
        if self.waiting:
            self.waiting.pop(self._luck.randrange(len(self.waiting))).set_result(None)
        return bool(self.waiting)


class FrontEnd:
    """One API process."""

    def __init__(self, fleet: "InputFleet", number: int, first_sequence: int = 1):
        self.number = number
        self.counters = MMCounters()
        self.pool = Pool(fleet.luck, fleet.failures)
        self.cache = FeatureCache(fleet.capacity, self.counters, number, first_sequence)
        fleet.all_folders.append(self.cache._folder.path)
        spec = fleet.readies[0].mm
        assert spec is not None
        hasher = InputHasher(Path("/nowhere"), "fake", {})
        self.pipeline = MMPipeline(spec, self.cache, self.pool, hasher, share=fleet.capacity > 0)
        self.transports = [Transport() for _ in fleet.readies]
        numbers = itertools.count(first_sequence)
        clients = [
            CoreClient(
                ready, TOKENIZER, transport, fleet.clock, front_end=number, numbers=numbers, replica=replica,
                inputs=self.pipeline,
            )
            for replica, (ready, transport) in enumerate(zip(fleet.readies, self.transports, strict=True))
        ]  # fmt: skip
        self.router = Router(clients, "prefix", number)
        self.router.open()


class InputFleet:
    """Made inside an event loop."""

    def __init__(self, seed: int, front_ends: int, replicas: int, capacity: int, failures: float = 0.0, **config: Any):
        self.luck = random.Random(seed)
        self.clock = FakeClock()
        self.capacity, self.failures = capacity, failures
        settings = resolved(**{"max_model_len": 64, "max_num_seqs": 3, "encoder_cache_tokens": 12, **config})
        self.folders = [FeatureFolder() for _ in range(replicas)]
        self.all_folders = [folder.path for folder in self.folders]  # those of front ends, too
        self.workers = [Reader(self.clock, settings.block_size, lambda *_: 1.0) for _ in range(replicas)]
        self.cores: list[EngineCore] = []
        self.readies: list[Ready] = []
        for number, (worker, folder) in enumerate(zip(self.workers, self.folders, strict=True)):
            mirror = FeatureMirror(folder.path)
            self.cores.append(
                EngineCore(settings, worker, self.clock, self._sender(number), front_ends, features=mirror)
            )
            self.readies.append(
                Ready(
                    "fake", "fake", "float32", VOCABULARY, settings.max_model_len, settings.max_num_seqs,
                    settings.max_num_batched_tokens, settings.block_size, settings.num_blocks - 1, True,
                    mm=MMSpec("fake", {"image": PLACEHOLDER}, {"image": TOKENS}, folder=folder.path),
                )
            )  # fmt: skip
        self.front_ends = [FrontEnd(self, number) for number in range(front_ends)]
        self.living = set(range(replicas))
        self.requests: list[tuple[int, asyncio.Task[None]]] = []  # with the front end
        self.ended = {"served": 0, "aborted": 0, "failed": 0}
        self.misses = 0
        self.errors: list[str] = []

    def _sender(self, replica: int) -> Callable[[int, bytes], None]:
        def send(front_end: int, data: bytes) -> None:
            deliver = self.front_ends[front_end].transports[replica].deliver
            if deliver is not None and replica in self.living:
                deliver(data)

        return send

    # ------------------------------------------------------------------------------------------------------- requests

    def start(self, front_end: int, pictures: list[int], abort_after: int | None = None, max_tokens: int = 3) -> None:
        """Start a request with these pictures, from the bytes of its inputs to its last token."""
        request = self._request(self.front_ends[front_end], pictures, abort_after, max_tokens)
        self.requests.append((front_end, asyncio.ensure_future(request)))

    async def _request(self, front: FrontEnd, pictures: list[int], abort_after: int | None, max_tokens: int) -> None:
        try:
            prepared = await asyncio.gather(
                *(front.pipeline.prepare(Media("image", bytes([one]) * 50), len(pictures)) for one in pictures)
            )
            prompt, placed = [1, 2], []
            for one in prepared:
                placed.append(PlacedInput(len(prompt), one))
                prompt += [*one.tokens, 3]
            refs = [one.input.ref_at(one.offset) for one in placed]
            params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
            stream = front.router.add_request([prompt], params, inputs=[placed])
            del prepared, placed
            if abort_after is not None:
                for _ in range(abort_after):
                    await asyncio.sleep(0)
                stream.close()
                self.ended["aborted"] += 1
                return
            outputs = await collect_outputs(stream)
            assert outputs[0].token_ids == expected_tokens(prompt, max_tokens, mm_inputs=refs)
            self.ended["served"] += 1
        except (ProcessingError, EngineDeadError):
            self.ended["failed"] += 1
        except RedlineError as error:  # of a core; nothing but a replica's death may fail a request there
            self.ended["failed"] += 1
            self.errors.append(str(error))

    # ---------------------------------------------------------------------------------------------------------- turns

    async def act(self) -> None:
        """One thing happens, somewhere."""
        what = self.luck.randrange(4)
        if what == 0:
            self.luck.choice(self.front_ends).pool.work()
        elif what == 1:
            self._move_message()
        else:
            self._step(self.luck.choice([*self.living]))
        for _ in range(self.luck.randrange(4)):
            await asyncio.sleep(0)

    def _move_message(self) -> bool:
        """The oldest message of one front end arrives at one core."""
        full = [
            (replica, transport)
            for front in self.front_ends
            for replica, transport in enumerate(front.transports)
            if transport.messages and replica in self.living
        ]
        if full:
            replica, transport = self.luck.choice(full)
            self.cores[replica].receive(transport.messages.popleft())
        return bool(full)

    def _step(self, replica: int) -> bool:
        core, worker = self.cores[replica], self.workers[replica]
        moved = core.step(self.clock.now())
        wait = next_wait(core, worker, self.clock.now())
        if wait is not None:
            self.clock.advance(wait)
            worker.pump()
        return moved or wait is not None

    def kill_core(self, replica: int) -> None:
        """The core's process is killed; its folder is removed as of any process that was killed."""
        self.living.discard(replica)
        self.misses += self.cores[replica].scheduler.features.misses
        self.folders[replica].remove()
        for front in self.front_ends:
            front.transports[replica].messages.clear()
            front.router.core_lost(replica, "it was killed")

    async def kill_front_end(self, number: int) -> None:
        """The API process is killed, and another one takes its place; messages that it sent still arrive."""
        old = self.front_ends[number]
        for front_end, request in self.requests:
            if front_end == number:
                request.cancel()
        for transport in old.transports:
            transport.deliver = None
        for one in old.router.cores:
            one._transport = _Nowhere()  # type: ignore[assignment]
        self.requests = [one for one in self.requests if one[0] != number]
        await asyncio.sleep(0)
        old.cache.close()
        late = [transport.messages for transport in old.transports]
        first = (int(next(old.router.cores[0]._numbers)) // GENERATION + 1) * GENERATION
        for replica in self.living:
            self.cores[replica]._drop_front_end(number, first)
        new = self.front_ends[number] = FrontEnd(self, number, first)
        for replica in {*range(len(self.cores))} - self.living:
            new.router.core_lost(replica, "it was killed")
        for replica, messages in enumerate(late):
            new.transports[replica].messages.extend(messages)

    async def finish(self) -> None:
        """Serve all requests to their end."""
        for _ in range(5000):
            moved = self._move_message()
            for front in self.front_ends:
                moved |= front.pool.work()
            for replica in sorted(self.living):
                moved |= self._step(replica)
            for _ in range(4):
                await asyncio.sleep(0)
            if not moved and all(request.done() for _, request in self.requests):
                break
        for _, request in self.requests:
            assert request.done(), "a request did not end"
            request.result()
        assert all("retried elsewhere" in error for error in self.errors), self.errors

    def check(self) -> None:
        for front in self.front_ends:
            front.cache.check()
        for replica in self.living:
            scheduler = self.cores[replica].scheduler
            scheduler.features.check([one.handle for one in scheduler.requests.values()])
            assert scheduler.features.misses == 0, "a mirror has drifted"

    async def close(self) -> None:
        """Empty all caches, and assert that nothing is left."""
        for front in self.front_ends:
            front.cache.clear()
        await self.finish()
        self.check()
        for replica in self.living:
            features = self.cores[replica].scheduler.features
            assert features.bytes == 0
            assert os.listdir(self.folders[replica].path) == ["owner.lock"], "a core keeps a file"
        for front in self.front_ends:
            assert front.counters.get("bytes") == 0
            assert os.listdir(front.cache._folder.path) == ["owner.lock"], "a front end keeps a file"
            front.router.close()
        for folder in self.folders:
            folder.remove()


class _Nowhere(LocalFiles):
    """The transport of a process that is gone."""

    def send(self, _message: ToCore) -> None: ...

    def close(self) -> None: ...
