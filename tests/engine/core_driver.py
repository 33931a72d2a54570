"""Drives an EngineCore with a fake worker under a fake clock, and collects what a front end would see."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.clock import FakeClock
from engine.columns import column, int32s, int64s
from engine.core.engine import EngineCore
from engine.core.grammars import GrammarManager
from engine.messages import (
    Abort,
    AddRequest,
    Finished,
    FromCore,
    Outputs,
    Sampling,
    decode_from_core,
    encode,
    make_handle,
)
from engine.resolved_config import ResolvedConfig
from engine.stats import Stats
from tests.engine.fake_executor import FakeExecutor


def resolved(**changes: Any) -> ResolvedConfig:
    settings: dict[str, Any] = {
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_blocks": 65,
        "enable_prefix_caching": True,
    }
    return ResolvedConfig(**{**settings, **changes})


def next_wait(core: EngineCore, worker: FakeExecutor, now: float) -> float | None:
    """Seconds to the next result, or to when the core wants to be asked again if that is sooner; None: neither."""
    waits = [core.next_deadline(now)]
    if worker.next_due is not None:
        waits.append(max(0.0, worker.next_due - now))
    return min((wait for wait in waits if wait is not None), default=None)


@dataclass
class Driver:
    """One core, one fake worker, any number of requests of front end 0."""

    config: ResolvedConfig = field(default_factory=resolved)
    seconds: Any = lambda *_: 1.0
    make_worker: type[FakeExecutor] = FakeExecutor
    grammars: GrammarManager | None = None

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        self.worker = self.make_worker(
            self.clock, self.config.block_size, self.seconds, self.config.draft_tokens, self.config.kv_windows
        )
        self.core = EngineCore(self.config, self.worker, self.clock, self._receive, grammars=self.grammars)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.times: dict[int, list[float]] = defaultdict(list)
        self.finished: dict[int, Finished] = {}
        self.cached: dict[int, int] = {}
        self.messages: list[FromCore] = []
        self.stats = Stats()
        self._sequence = 0

    def add(self, prompt: list[int], max_tokens: int = 8, stop_ids: tuple[int, ...] = (), **fields: Any) -> int:
        handle = make_handle(0, self._sequence)
        self._sequence += 1
        message = AddRequest(handle, column(prompt), max_tokens, Sampling(), stop_ids, **fields)
        self.core.receive(encode(message))
        return handle

    def abort(self, handle: int) -> None:
        self.core.receive(encode(Abort((handle,))))

    def turn(self) -> bool:
        """Let the core do all it can at this moment; False if that was nothing."""
        moved = self.core.step(self.clock.now())
        self.core.scheduler.check()
        return moved

    def advance(self) -> None:
        """Go to when something is due, and deliver the results that are."""
        self.clock.advance(next_wait(self.core, self.worker, self.clock.now()) or 0.0)
        self.worker.pump()

    def run(self, turns: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(turns):
            if not self.turn():
                if not self.core.has_work:
                    return
                self.advance()
        raise AssertionError(f"still busy after {turns} turns")

    def _receive(self, front_end: int, data: bytes) -> None:
        message = decode_from_core(data)
        self.messages.append(message)
        if not isinstance(message, Outputs):
            return
        assert front_end == 0
        handles = int64s(message.handles)
        if message.counts:
            handles = np.repeat(handles, int32s(message.counts))
        for handle, token in zip(handles.tolist(), int32s(message.tokens).tolist(), strict=True):
            assert handle not in self.finished, "a token after the end"
            self.tokens[handle].append(token)
            self.times[handle].append(message.at)
        for one in message.finished:
            assert one.handle not in self.finished, "ended twice"
            self.finished[one.handle] = one
        for one in message.admitted:
            assert one.handle not in self.cached, "admitted twice"
            self.cached[one.handle] = one.cached_tokens
        if message.stats is not None:
            self.stats = message.stats
