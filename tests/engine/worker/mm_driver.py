"""Requests with multimodal inputs, and a driver that schedules them as the core does."""

import dataclasses
import hashlib
import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from safetensors.numpy import save_file

from engine.config import EngineConfig
from engine.core.hashing import joint_range
from engine.memory import resolve
from engine.messages import MMInputRef, Sampling, SlotAssignment, StepMessage
from engine.model.model_info import ModelInfo, read_hf_config, read_model_info
from engine.multimodal.families import MM_FAMILIES, embedding_ids
from engine.multimodal.types import Processed
from engine.resolved_config import ResolvedConfig
from engine.worker.in_process import InProcessExecutor
from engine.worker.multiprocess import MultiprocessExecutor
from tests.engine.worker.driver import VOCAB, Driver, Prefixes, Request
from tests.engine.worker.mm_model import MMModel

Executors = Callable[[EngineConfig, ModelInfo, ResolvedConfig], Any]

ROWS, BLOCK, BLOCKS = 6, 4, 2000
RESIDENT = 1  # inputs that the driver keeps in the encoder cache while no request needs them


@dataclass
class MMRequest(Request):
    """A request with inputs.

    inputs: as the core gets them. processed: what the processor made of each.
    """

    inputs: tuple[MMInputRef, ...] = ()
    processed: list[Processed] = field(default_factory=list)

    def key(self, end: int) -> tuple[int, ...]:
        """See `Request.key`: the inputs that begin before `end` are part of it."""
        within = tuple(hash((one.hash, one.offset)) for one in self.inputs if one.offset < end)
        joint = joint_range(self.inputs)
        if joint is not None and joint[0] < end:  # the first one depends on the others, and on the text between them
            begin, last = joint
            others = [(one.hash, one.offset) for one in self.inputs]
            within = (*within, hash((*others, *self.prompt[begin:last])))
        return (*within, *Request.key(self, end))


class MMDriver(Driver):
    """Also encodes inputs and frees embeddings.

    Args:
        executor: of the model.
        resolved: its configuration.
    """

    def __init__(self, executor: Any, resolved: ResolvedConfig):
        super().__init__(
            executor, rows=ROWS, block_size=resolved.block_size, num_blocks=BLOCKS, windows=resolved.kv_windows
        )
        self.resolved = resolved
        self.resident: dict[bytes, None] = {}
        self.encoded = 0
        self.split = 0  # chunks that end within an input
        self.hits: list[int] = []  # of admitted requests: where the prefix hit ended
        self.hits_within = 0  # prefix hits that ended within an input

    def _fitting(self, request: Request, count: int) -> int:
        assert isinstance(request, MMRequest)
        start, end = request.computed, request.computed + count
        joint = joint_range(request.inputs)
        if joint is not None and joint[0] < end < joint[1]:
            # All of them and the text between them are one piece.
            return (joint[0] if joint[0] > start else joint[1]) - start
        for one in request.inputs:
            if one.bidirectional and one.offset < end < one.offset + one.length:
                last = one.offset + one.length
                end = last if start >= one.offset or one.offset == start else one.offset
        return end - start

    def _completed(self, message: StepMessage, work: list[tuple[Request, int]]) -> StepMessage:
        needed: dict[bytes, tuple[int, int]] = {}
        for request, count in work:
            assert isinstance(request, MMRequest)
            start, end = request.computed, request.computed + count
            for index, one in enumerate(request.inputs):
                if one.offset < end and one.offset + one.length > start:
                    needed.setdefault(one.hash, (request.row, index))
                    self.split += end < one.offset + one.length
        unneeded = [key for key in self.resident if key not in needed]
        freed = unneeded[: max(0, len(unneeded) - RESIDENT)]
        for key in freed:
            del self.resident[key]
        new = {key: place for key, place in needed.items() if key not in self.resident}
        self.encoded += len(new)
        self.resident.update(dict.fromkeys(new))
        return msgspec.structs.replace(message, free_encoder_keys=tuple(freed), encoder_inputs=tuple(new.values()))

    def _admit(self, request: Request, prefixes: Prefixes) -> SlotAssignment:
        assert isinstance(request, MMRequest)
        assignment = super()._admit(request, prefixes)
        hit = request.computed
        self.hits.append(hit)
        self.hits_within += any(one.offset < hit < one.offset + one.length for one in request.inputs)
        return msgspec.structs.replace(assignment, mm_inputs=request.inputs)

    def forget_embeddings(self) -> None:
        """Free all embeddings with the next step that needs any."""
        message = StepMessage(self.step, free_encoder_keys=tuple(self.resident))
        self._run_step(message)
        self.resident = {}


class Prompts:
    """Makes the requests of a model.

    Args:
        folder: of the model; feature files are written next to its own files.
    """

    def __init__(self, folder: Path, model: MMModel):
        self._folder, self._model = folder, model
        hf_config = read_hf_config(folder, EngineConfig(model=str(folder)))
        family = MM_FAMILIES[hf_config.model_type]
        module = importlib.import_module(f"engine.multimodal.processors.{family.processor}")
        self._processor = module.make(folder, hf_config)
        self._bidirectional = model.kind in family.bidirectional
        self._joint = bool(family.joint)
        self._special = set(embedding_ids(family, hf_config))
        self._special |= {token for number in range(3) for token in self._process(number).tokens}

    def text(self, seed: int, length: int) -> list[int]:
        luck = random.Random(seed)
        return luck.choices([token for token in range(3, VOCAB) if token not in self._special], k=length)

    def request(self, *parts: list[int] | int) -> MMRequest:
        """A request whose prompt is made of texts and numbers of sample inputs."""
        count = sum(isinstance(part, int) for part in parts)
        prompt: list[int] = []
        inputs, processed = [], []
        for part in parts:
            if not isinstance(part, int):
                prompt += part
                continue
            found = self._process(part, count)
            key = hashlib.blake2b(f"{part} {count}".encode(), digest_size=16).digest()
            file = self._folder / f"{part}-{count}.features"
            if not file.exists():
                save_file(dict(found.tensors), file)
            inputs.append(
                MMInputRef(
                    key, len(prompt), len(found.tokens), self._bidirectional, str(file), found.grid,
                    found.seconds_per_frame, self._joint,
                )
            )  # fmt: skip
            prompt += found.tokens
            processed.append(found)
        return MMRequest(prompt, Sampling(logprobs=VOCAB), inputs=tuple(inputs), processed=processed)

    def _process(self, number: int, count: int = 1) -> Processed:
        processed: Processed = self._processor.process(
            self._model.kind, self._model.media(number), count, self._model.options
        )
        return processed

    def samples(self) -> list[MMRequest]:
        """One input, several, the same one twice, none; prompts that begin alike; equal ids with different inputs."""
        start, end = self.text(1, 5), self.text(2, 7)
        return [
            self.request(start, 0, end),
            self.request(self.text(3, 3), 1, self.text(4, 2), 2, self.text(5, 4)),
            self.request(start, 0, self.text(6, 6)),
            self.request(self.text(7, 11)),
            self.request(start, 1, end),
            self.request(self.text(8, 2), 2, self.text(9, 1), 2, self.text(10, 3)),
        ]


def start(folder: Path, ranks: int = 1, block: int = BLOCK, make: Executors | None = None, **options: Any) -> MMDriver:
    """Start an executor on a model's folder; `driver.executor.shutdown()` ends it.

    `make`: of the configuration, the model and the resolved configuration; None: on this machine.
    """
    options = {"dtype": "float32", "kernels": "torch", **options}
    config = EngineConfig(
        model=str(folder), tensor_parallel_size=ranks, max_num_seqs=ROWS, block_size=block, **options
    )  # fmt: skip
    model_info = read_model_info(config)
    pool = model_info.kv_bytes_per_token * block * BLOCKS
    resolved = dataclasses.replace(
        resolve(dataclasses.replace(config, kv_cache_memory_bytes=pool), model_info).config, num_blocks=BLOCKS
    )
    several = config.num_ranks > 1
    executor = (make or (MultiprocessExecutor if several else InProcessExecutor))(config, model_info, resolved)
    return MMDriver(executor, resolved)
