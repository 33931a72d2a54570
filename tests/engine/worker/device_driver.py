"""Starts executors of asynchronous devices, and lets a real EngineCore drive any executor."""

import dataclasses
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.clock import MonotonicClock
from engine.columns import column, int32s, int64s
from engine.config import EngineConfig
from engine.core.engine import EngineCore
from engine.core.grammars import GrammarManager
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.grammar import Grammar
from engine.memory import resolve
from engine.messages import AddRequest, Outputs, Sampling, decode_from_core, encode
from engine.model.model_info import ModelInfo, read_model_info
from engine.resolved_config import ResolvedConfig
from engine.stats import Stats
from engine.worker.device import Device
from engine.worker.in_process import InProcessDeviceExecutor, InProcessExecutor
from engine.worker.worker_start import StartReport
from tests.engine.worker.driver import VOCAB, Driver

Progress = Any


def configure(
    folder: Path, *, rows: int = 6, block_size: int = 4, num_blocks: int = 2000, **options: Any
) -> tuple[EngineConfig, ModelInfo, ResolvedConfig]:
    options = {"dtype": "float32", **options}
    config = EngineConfig(model=str(folder), max_num_seqs=rows, block_size=block_size, **options)
    model_info = read_model_info(config)
    pool = model_info.kv_bytes_per_token * block_size * num_blocks
    config = dataclasses.replace(config, kv_cache_memory_bytes=pool)
    return config, model_info, resolve(config, model_info).config


def start_executor(
    device: Device | None, folder: Path, *, use_triton: bool = False, **options: Any
) -> tuple[InProcessExecutor, ResolvedConfig]:
    """An executor on a device; None: the CPU."""
    config, model_info, resolved = configure(folder, **options)
    if device is None:
        return InProcessExecutor(config, model_info, resolved), resolved

    def start(
        config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig, progress: Progress
    ) -> tuple[Any, StartReport]:
        from engine.model.loading.open_model import open_model
        from engine.worker.device_builder import build_device_runner

        meta_model = open_model(config, model_info, progress)
        built = build_device_runner(config, model_info, resolved, meta_model, device, use_triton=use_triton)
        return built.runner, StartReport({}, built.kernels, built.warnings)

    return InProcessDeviceExecutor(config, model_info, resolved, start=start), resolved


def make_device_driver(device: Device, folder: Path, **options: Any) -> Driver:
    executor, resolved = start_executor(device, folder, **options)
    rows, size, blocks = resolved.max_num_seqs, resolved.block_size, resolved.num_blocks
    return Driver(executor, rows=rows, block_size=size, num_blocks=blocks, windows=resolved.kv_windows)


class CoreDriver:
    """A real EngineCore in real time: it schedules ahead of results, in bursts, and preempts."""

    def __init__(self, executor: InProcessExecutor, resolved: ResolvedConfig):
        self.executor = executor
        grammars = GrammarManager(lambda: GrammarVocabulary(Tokenizer(StandInBackend(VOCAB)), VOCAB))
        self.core = EngineCore(resolved, executor, MonotonicClock(), self._receive, grammars=grammars)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.stats = Stats()
        self.most_in_flight = 0
        self._finished: set[int] = set()

    def load_adapter(self, name: str, folder: Path) -> None:
        self.core.load_adapter(name, str(folder)).result()
        deadline = time.monotonic() + 10
        while name not in self.core._adapters.names():  # the future is done before its callbacks have run
            assert time.monotonic() < deadline
            time.sleep(1e-3)

    def run(
        self,
        requests: list[tuple[list[int], Sampling]],
        new: int,
        adapters: Sequence[str] = ("",),
        grammars: Sequence[Grammar | None] = (None,),
    ) -> list[list[int]]:
        """Serve all requests to `new` tokens each, with the adapters and grammars in turns; returns their tokens."""
        first = len(self.tokens)
        for handle, (prompt, sampling) in enumerate(requests, first):
            self.tokens[handle] = []
            adapter = adapters[handle % len(adapters)]
            grammar = grammars[handle % len(grammars)]
            message = AddRequest(handle, column(prompt), new, sampling, adapter=adapter, grammar=grammar)
            self.core.receive(encode(message))
        handles = list(range(first, first + len(requests)))
        deadline = time.monotonic() + 60
        pause = threading.Event()
        while not self._finished.issuperset(handles):
            assert time.monotonic() < deadline, "requests don't end"
            if not self.core.step(time.monotonic()):
                pause.wait(1e-4)
            self.most_in_flight = max(self.most_in_flight, len(self.core._in_flight))
        return [self.tokens[handle] for handle in handles]

    def _receive(self, front_end: int, data: bytes) -> None:
        message = decode_from_core(data)
        if not isinstance(message, Outputs):
            return
        handles = int64s(message.handles)
        if message.counts:
            handles = np.repeat(handles, int32s(message.counts))
        for handle, token in zip(handles.tolist(), int32s(message.tokens).tolist(), strict=True):
            self.tokens[handle].append(token)
        for one in message.finished:
            assert not one.error, one.error
            self._finished.add(one.handle)
        self.stats = message.stats or self.stats
