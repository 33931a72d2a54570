"""Measures steps of a decoder with random weights, as the engine runs them on this machine's device."""

import gc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engine.columns import column
from engine.config import EngineConfig
from engine.devices import machine_for
from engine.hardware.step_time import DecoderShape, StepWork
from engine.memory import resolve
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.model.model_info import ModelInfo, read_model_info
from engine.worker.executor import make_executor

WARM_UP_STEPS = 1  # of each visit
LEAST_LENGTH = 512  # tokens of a request, for servers of the same model


@dataclass(frozen=True, slots=True)
class Composition:
    """What a step computes: `decodes` requests of one token after `context` others, and chunks of prompts.

    chunks: of each, its tokens and the tokens before them; each ends its prompt, so that it samples.
    """

    decodes: int = 0
    context: int = 0
    chunks: tuple[tuple[int, int], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest request."""
        return max([self.context + 1, *(count + before for count, before in self.chunks)])

    @property
    def held(self) -> int:
        """Tokens of all requests."""
        return self.decodes * (self.context + 1) + sum(count + before for count, before in self.chunks)

    def work(self, later: int) -> StepWork:
        """What the step that is so many steps `later` computes, as the latency model sees it."""
        context = self.decodes * (self.context + 1 + later)
        return StepWork(self.decodes, context, list(self.chunks), self.decodes + len(self.chunks))


class StepMeter:
    """An executor with a random model, and steps that are made for it. Close it, or use it in a `with` statement.

    `folder` has the model's configuration, for `redline serve --load-format dummy`.

    Args:
        compositions: those that will be measured; they decide how large the KV cache must be.
        count: how many steps of each in turn.
        options: further fields of EngineConfig, such as `device`.

    Raises RedlineError if such a model can't be run here.
    """

    def __init__(
        self,
        shape: DecoderShape,
        compositions: Sequence[Composition],
        count: int,
        options: dict[str, Any] | None = None,
    ):
        self.shape = shape
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        longest = max(LEAST_LENGTH, max(one.longest for one in compositions) + count + WARM_UP_STEPS + 1)
        (self.folder / "config.json").write_text(json.dumps(_config(shape, longest)))
        config = EngineConfig(
            model=str(self.folder), load_format="dummy", max_model_len=longest,
            max_num_seqs=max(one.decodes + len(one.chunks) for one in compositions),
            max_num_batched_tokens=max(one.work(0).tokens for one in compositions), **(options or {}),
        )  # fmt: skip
        machine = machine_for(config)
        config = machine.adapt(config)
        self._info: ModelInfo = read_model_info(config)
        self._block_size = config.block_size or machine.defaults.block_size
        each = count + WARM_UP_STEPS + 1 + self._block_size  # of a request beside its tokens
        tokens = max(longest, *(one.held + each * (one.decodes + len(one.chunks)) for one in compositions))
        blocks = tokens // self._block_size + 2
        config = replace(config, kv_cache_memory_bytes=blocks * self._block_size * self._info.kv_bytes_per_token)
        resolved = resolve(config, self._info, machine=machine).config
        self._executor = make_executor(config, self._info, resolved)
        self.kernels = self._executor.kernels
        budget = machine.step_tokens(config, self._info).count
        self.defaults = replace(machine.defaults, max_num_batched_tokens=budget)
        num_blocks = self._executor.num_blocks or resolved.num_blocks
        self._random = np.random.default_rng(1)
        # In an order of their own: requests that ran before have left the free blocks in disorder.
        self._blocks = 1 + self._random.permutation(num_blocks - 1).astype(np.int32)
        self._step, self._generation, self._live, self._held = 0, 0, 0, 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._executor.shutdown()
        del self._executor
        gc.collect()  # an executor is part of cycles, and its model would stay in memory beside the next one
        self._folder.cleanup()

    def seconds(self, composition: Composition, count: int) -> list[float]:
        """The device's time of each of `count` such steps in turn; those before them, which aren't, are left out."""
        rows = [(1, composition.context)] * composition.decodes
        live = range(self._live)
        self._live = len(rows) + len(composition.chunks)
        self._generation += 1
        # Decodes go on from step to step. Chunks have a new request in each, in a slot behind them.
        decoding = self._assigned(0, rows, count + WARM_UP_STEPS)
        times = []
        for number in range(count + WARM_UP_STEPS):
            begin = len(rows)
            self._generation += 1
            chunks = self._assigned(begin, composition.chunks)
            freed = live if number == 0 else range(begin, self._live)
            message = StepMessage(
                step=self._step,
                freed_slots=column(freed),
                assigned_slots=(*(decoding if number == 0 else ()), *chunks),
                chunks=column([(begin + i, size) for i, (size, _) in enumerate(composition.chunks)]),
            )
            self._step += 1
            forward = self._executor.submit(encode(message))
            result = decode_result(self._executor.sample(message.step).result())
            forward.result()
            times.append(result.seconds)
        return times[WARM_UP_STEPS:]

    def _assigned(self, first: int, rows: Sequence[tuple[int, int]], later: int = 0) -> list[SlotAssignment]:
        """New requests in the slots from `first` on, of tokens to compute and others before them; room for more."""
        sizes = [-(-(count + before + 1 + later) // self._block_size) for count, before in rows]
        held = 0 if first == 0 else self._held
        blocks = self._blocks[held : held + sum(sizes)]
        if first == 0:
            self._held = sum(sizes)
        tables = np.split(blocks, np.cumsum(sizes)[:-1]) if rows else []
        return [
            SlotAssignment(
                slot=first + i,
                generation=self._generation,
                tokens=self._random.integers(0, self._info.vocab_size, count + before, dtype=np.int32).tobytes(),
                num_prompt_tokens=count + before,
                num_computed_tokens=before,
                block_tables=(table.tobytes(),),
                sampling=Sampling(),
            )
            for i, ((count, before), table) in enumerate(zip(rows, tables, strict=True))
        ]


def _config(shape: DecoderShape, max_model_len: int) -> dict[str, Any]:
    """The config.json of a model of the Llama kind, for `--load-format dummy`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
