"""Serves a request under five conditions through a real EngineCore, and keeps every bit of the answers.

alone        whole, in one step, with nothing else
in a batch   with as many others as make 64 requests, in the same steps
in chunks    alone, with a token budget below the longer prompts
preempted    at a lower priority than requests that need its blocks as they grow
prefix hit   again, after the batch has left its blocks in the cache
"""

import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.clock import MonotonicClock
from engine.columns import column, float32s, int32s, int64s
from engine.config import EngineConfig
from engine.core.engine import EngineCore
from engine.core.grammars import GrammarManager
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.grammar import Grammar
from engine.logprob_columns import TokenLogprobs
from engine.memory import resolve
from engine.messages import AddRequest, MMInputRef, Outputs, Sampling, decode_from_core, encode, make_handle
from engine.model.model_info import read_model_info
from engine.worker.executor import make_executor

PATIENCE_S = 120.0
BLOCK, LENGTH, NEW = 16, 704, 20
BATCH = 64
FEW_BLOCKS, FEW_SLOTS, SMALL_BUDGET = 65, 20, 96  # of the engine that chunks and preempts; one block is the null block
GROWING = 44  # tokens of prompts that take 3 blocks, and a fourth one from their fifth output token on
BEHIND = 1  # the priority of a request that is preempted before those of priority 0

Entry = tuple[list[int], bytes, int]  # ids, values and the token's rank; bytes, since different floats may print alike


@dataclass(frozen=True, slots=True)
class Probe:
    """A request that is compared with itself."""

    prompt: list[int]
    sampling: Sampling
    adapter: str = ""
    inputs: tuple[MMInputRef, ...] = ()
    grammar: Grammar | None = None

    @property
    def reads_cache(self) -> bool:
        """Whether a second one finds blocks in the prefix cache."""
        return self.sampling.prompt_logprobs < 0 and len(self.prompt) > BLOCK


@dataclass(slots=True)
class Answer:
    """What one request got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[Entry] = field(default_factory=list)
    prompt: dict[int, Entry] = field(default_factory=dict)  # by position
    cached: int = 0
    preemptions: int = 0

    @property
    def bits(self) -> tuple[Any, ...]:
        return self.tokens, self.logprobs, sorted(self.prompt.items())


SAMPLINGS = {
    "greedy": Sampling(),
    "greedy with logprobs": Sampling(logprobs=4),
    "drawn": Sampling(temperature=0.9, seed=11),
    "drawn with logprobs": Sampling(temperature=1.0, seed=12, logprobs=0),
    "filtered": Sampling(temperature=1.1, top_p=0.9, top_k=60, min_p=0.01, seed=13, logprobs=2),
    "with penalties": Sampling(
        temperature=0.8, seed=14, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3, logprobs=1
    ),
    "with prompt logprobs": Sampling(logprobs=3, prompt_logprobs=2),
}
LENGTHS = (560, 37, 1, 130, 65, 300, 90)  # of their prompts; attention to more than 512 tokens is summed in parts


def probes(vocabulary: int, adapters: Sequence[str] = ("",)) -> dict[str, Probe]:
    """One request of each kind; the adapters take turns."""
    luck = random.Random(1)
    found = {
        name: Probe(luck.choices(range(vocabulary), k=length), sampling, adapters[i % len(adapters)])
        for i, ((name, sampling), length) in enumerate(zip(SAMPLINGS.items(), LENGTHS, strict=True))
    }
    prompt = luck.choices(range(vocabulary), k=70)
    found["with a grammar"] = Probe(prompt, SAMPLINGS["drawn with logprobs"], grammar=Grammar("regex", "[a-z]{100}"))
    return found


def others(count: int, vocabulary: int, adapters: Sequence[str] = ("",)) -> list[Probe]:
    """The rest of a batch, each with a prompt, a sampling and an adapter of its own."""
    luck = random.Random(2)
    samplings = [one for one in SAMPLINGS.values() if one.prompt_logprobs < 0]
    return [
        Probe(luck.choices(range(vocabulary), k=luck.randint(1, 120)), luck.choice(samplings), luck.choice(adapters))
        for _ in range(count)
    ]


class Served:
    """A core and its executor, driven in this thread."""

    def __init__(self) -> None:
        self.core: EngineCore
        self._answers: dict[int, Answer] = {}
        self._samplings: dict[int, Sampling] = {}
        self._sequence = 0

    def run(self, requests: Sequence[Probe], *, behind: Probe | None = None) -> list[Answer]:
        """Serve requests that come together, to NEW tokens each.

        `behind` comes before them, at a lower priority; its answer is the last one.
        """
        waiting = list(requests)
        handles = [] if behind is None else [self._send(behind, BEHIND)]
        deadline = time.monotonic() + PATIENCE_S
        while waiting or self.core.has_work:
            assert time.monotonic() < deadline, "the requests take too long"
            if waiting and all(self._runs(handle) for handle in handles):
                handles[:0] = [self._send(request) for request in waiting]
                waiting = []
            if not self.core.step(time.monotonic()):
                time.sleep(0.0002)
        answers = [self._answers.pop(handle) for handle in handles]
        assert [len(answer.tokens) for answer in answers] == [NEW] * len(answers)
        return answers

    def _runs(self, handle: int) -> bool:
        request = self.core.scheduler.requests.get(handle)
        return request is not None and request.slot >= 0

    def _send(self, request: Probe, priority: int = 0) -> int:
        handle = make_handle(0, self._sequence)
        self._sequence += 1
        self._answers[handle], self._samplings[handle] = Answer(), request.sampling
        message = AddRequest(
            handle, column(request.prompt), NEW, request.sampling, priority=priority, adapter=request.adapter,
            mm_inputs=request.inputs, grammar=request.grammar,
        )  # fmt: skip
        self.core.receive(encode(message))
        return handle

    def load_adapter(self, name: str, path: Path) -> None:
        self.core.load_adapter(name, str(path)).result()
        deadline = time.monotonic() + PATIENCE_S
        while name not in self.core._adapters.names():  # the future is done before its callbacks have run
            assert time.monotonic() < deadline
            time.sleep(1e-3)

    def forget(self) -> None:
        """Empty the prefix cache."""
        self.core.scheduler.reset_prefix_cache()

    def book(self, front_end: int, data: bytes) -> None:
        """Take a message of the core."""
        message = decode_from_core(data)
        assert front_end == 0
        assert isinstance(message, Outputs)
        owners = int64s(message.handles)
        if message.counts:
            owners = np.repeat(owners, int32s(message.counts))
        for handle, token in zip(owners.tolist(), int32s(message.tokens).tolist(), strict=True):
            self._answers[handle].tokens.append(token)
        if message.logprobs is not None:
            for at, entry in _entries(message.logprobs):
                handle = int(owners[at])
                self._answers[handle].logprobs.append(_cut(entry, self._samplings[handle].logprobs))
        for scored in message.prompt_logprobs:
            for at, entry in _entries(scored.logprobs):
                kept = _cut(entry, self._samplings[scored.owner].prompt_logprobs)
                self._answers[scored.owner].prompt.setdefault(at, kept)
        for admitted in message.admitted:
            self._answers[admitted.handle].cached = admitted.cached_tokens
        for finished in message.finished:
            assert not finished.error, finished.error
            self._answers[finished.handle].preemptions = finished.preemptions


def _entries(logprobs: TokenLogprobs) -> Iterator[tuple[int, Entry]]:
    width = logprobs.width
    ids, values = int32s(logprobs.ids).reshape(-1, width), float32s(logprobs.values).reshape(-1, width)
    columns = int32s(logprobs.index).tolist(), ids, values, int32s(logprobs.ranks).tolist()
    for at, some, numbers, rank in zip(*columns, strict=True):
        yield at, (some.tolist(), numbers.tobytes(), rank)


def _cut(entry: Entry, top: int) -> Entry:
    """The columns of one request; there are more where another one of the message wants more."""
    ids, values, rank = entry
    return ids[: 1 + top], values[: 4 * (1 + top)], rank


@contextmanager
def serving(folder: Path, *, adapters: dict[str, Path] | None = None, **options: Any) -> Iterator[Served]:
    """An engine of a folder with a model; `options` of EngineConfig, and `blocks` of the KV cache."""
    blocks = options.pop("blocks", 2000)
    options = {"max_model_len": LENGTH, "block_size": BLOCK, "scheduling_policy": "priority", **options}
    config = EngineConfig(model=str(folder), **options)
    model_info = read_model_info(config)
    pool = 2 * model_info.kv_bytes_per_token * config.tensor_parallel_size * config.block_size * blocks  # type: ignore[operator]
    config = dataclasses.replace(config, kv_cache_memory_bytes=pool)
    resolved = dataclasses.replace(resolve(config, model_info).config, num_blocks=blocks)
    executor = make_executor(config, model_info, resolved)
    try:
        served = Served()
        tokens = model_info.vocab_size
        grammars = GrammarManager(lambda: GrammarVocabulary(Tokenizer(StandInBackend(tokens)), tokens))
        served.core = EngineCore(resolved, executor, MonotonicClock(), served.book, grammars=grammars)
        for name, path in (adapters or {}).items():
            served.load_adapter(name, path)
        yield served
    finally:
        executor.shutdown()


def large(folder: Path, **options: Any) -> AbstractContextManager[Served]:
    """An engine with room for a batch of 64 whole prompts in one step."""
    return serving(folder, **{"max_num_seqs": BATCH, "max_num_batched_tokens": 8192, **options})


def small(folder: Path, **options: Any) -> AbstractContextManager[Served]:
    """An engine that computes prompts in chunks, and has few blocks."""
    sizes = {"max_num_seqs": FEW_SLOTS, "max_num_batched_tokens": SMALL_BUDGET, "blocks": FEW_BLOCKS}
    return serving(folder, **{**sizes, **options})


def different(folder: Path, kinds: dict[str, Probe], rest: Sequence[Probe], **options: Any) -> list[str]:
    """The requests and conditions whose bits are not those of the request alone; each condition is seen to occur.

    Args:
        kinds: the requests that are compared, by name.
        rest: the others of the batch.
        options: of both engines.
    """
    found: list[str] = []
    alone: dict[str, Answer] = {}

    def compare(condition: str, name: str, answer: Answer) -> None:
        if answer.bits != alone[name].bits:
            part = "logprobs" if answer.tokens == alone[name].tokens else "tokens"
            found.append(f"{name}, {condition}: {part}")

    with large(folder, **options) as served:
        for name, probe in kinds.items():
            served.forget()
            (alone[name],) = served.run([probe])
            assert not alone[name].cached
        served.forget()
        together = served.run([*kinds.values(), *rest])
        for name, answer in zip(kinds, together, strict=False):
            compare("in a batch", name, answer)
        for name, probe in kinds.items():
            (answer,) = served.run([probe])
            assert (answer.cached > 0) == probe.reads_cache, f"{name}: {answer.cached} tokens of the cache"
            compare("prefix hit", name, answer)
    with small(folder, **options) as served:
        tokens = sorted({token for probe in rest for token in probe.prompt})
        for name, probe in kinds.items():
            served.forget()
            (answer,) = served.run([probe])
            compare("in chunks", name, answer)
            served.forget()
            answer = _preempted(served, probe, tokens)
            assert answer.preemptions, f"{name} was not preempted"
            compare("preempted", name, answer)
    return found


def _preempted(served: Served, probe: Probe, tokens: Sequence[int]) -> Answer:
    """Serve a request before others that fill the free blocks at first, and need more of them before it can end."""
    luck = random.Random(3)
    free = FEW_BLOCKS - 1 - -(-len(probe.prompt) // BLOCK)
    count = min(FEW_SLOTS - 1, free * 2 // 7)
    growing = [Probe(luck.choices(tokens, k=GROWING), Sampling()) for _ in range(count)]
    return served.run(growing, behind=probe)[-1]
