"""Every family, served in several ways, against plain transformers: the rows of `make parity`.

A served row is compared token for token with greedy `generate()`, and number for number: log-probabilities of the whole
vocabulary after each token.
"""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engine.messages import Sampling
from tests.engine.worker.driver import VOCAB, Driver, Request

NEW = 12
# Largest difference of a log-probability, float32 against float32 that was summed in another order. The logits of the
# tiny models lie several units apart.
TOLERANCE = 5e-4
CASES = ("alone", "ragged", "chunked", "prefix hit", "preempted")


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one family in one case."""

    family: str
    case: str
    passed: bool
    max_logit_difference: float
    note: str = ""


class Reference:
    """The output of plain transformers for prompts. It is cached, since all cases have the same prompts."""

    def __init__(self, model: torch.nn.Module):
        self._model: Any = model
        self._known: dict[tuple[int, ...], tuple[list[int], torch.Tensor]] = {}
        self._differences: dict[tuple[int, ...], float] = {}

    @torch.inference_mode()
    def run(self, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
        """Greedy output, and log-probabilities [NEW, vocabulary] of each of its tokens."""
        key = tuple(prompt)
        if key not in self._known:
            ids = torch.tensor([prompt])
            out = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
            )
            logits = self._model(out[:, :-1]).logits[0, len(prompt) - 1 :]
            self._known[key] = out[0, len(prompt) :].tolist(), torch.log_softmax(logits.float(), -1)
        return self._known[key]

    def early_difference(self, prompt: list[int]) -> float:
        """How much the last log-probabilities change with an earlier token that is within the windows of all layers."""
        key = tuple(prompt)
        if key not in self._differences:
            at = max(0, len(prompt) - 20)
            other = [*prompt[:at], (prompt[at] + 1) % VOCAB, *prompt[at + 1 :]]
            with torch.inference_mode():
                logits = [self._model(torch.tensor([ids])).logits[0, -1] for ids in (prompt, other)]
            first, second = (line.log_softmax(-1) for line in logits)
            self._differences[key] = float((first - second).abs().max())
        return self._differences[key]


def merged(model: torch.nn.Module, folder: Path, scale: float) -> Reference:
    """The reference of a model with an adapter added to its weights."""
    whole = copy.deepcopy(model)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, down in tensors.items():
            if "lora_A" in name:
                path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
                whole.get_submodule(path).weight += scale * tensors[name.replace("lora_A", "lora_B")] @ down
    return Reference(whole)


def prompts(seed: int) -> list[list[int]]:
    """Short and long ones, and some that begin alike."""
    luck = random.Random(seed)
    shared = [luck.randrange(VOCAB) for _ in range(21)]
    alone = [[luck.randrange(VOCAB) for _ in range(length)] for length in (1, 3, 18, 70)]
    return [*alone, [*shared, 5, 6, 7], [*shared, 8], [*shared[:16], 1, 2], [*shared, 5, 6, 7]]


def serve(driver: Driver, case: str) -> list[Request]:
    """Run the prompts in the way of a case, and check that the case occurred, e.g. that a request was preempted."""
    requests = [Request(prompt, Sampling(logprobs=VOCAB)) for prompt in prompts(1)]
    if case == "alone":
        for request in requests:
            driver.run([request], NEW, seed=0, chunk=0, preempt=0)
    elif case == "ragged":
        driver.run(requests, NEW, seed=2, chunk=0, preempt=0, prefixes=_Forgetful())
    elif case == "chunked":
        driver.run(requests, NEW, seed=3, preempt=0, prefixes=_Forgetful())
        assert driver.left or not any(driver.windows), "no window left a block"
    elif case == "prefix hit":
        prefixes: dict[tuple[int, ...], tuple[int, ...]] = {}
        driver.run([Request(list(request.prompt)) for request in requests], NEW, seed=4, preempt=0, prefixes=prefixes)
        before = driver.shared
        driver.run(requests, NEW, seed=5, preempt=0, prefixes=prefixes)
        full = sum((len(request.prompt) - 1) // driver.block_size for request in requests)
        assert driver.shared - before == full, f"{driver.shared - before} of {full} full blocks were hit"
    else:
        before = driver.preemptions
        driver.run(requests, NEW, seed=6, preempt=0.6)
        assert driver.preemptions > before, "nothing was preempted"
    return requests


def check_briefly(driver: Driver, reference: Reference, new: int = 4, **options: Any) -> None:
    """Compare a few requests with the reference, for cases that interpreted kernels make slow.

    `options` are those of `Driver.run`.
    """
    requests = [Request(prompt, Sampling(logprobs=VOCAB)) for prompt in prompts(1)[1:4]]
    driver.run(requests, new, preempt=0, **options)
    for request in requests:
        tokens, logprobs = reference.run(request.prompt)
        assert request.output == tokens[:new]
        found = torch.tensor([[one[token] for token in range(VOCAB)] for one in request.logprobs])
        assert (found - logprobs[:new]).abs().max() < TOLERANCE


class _Forgetful(dict[tuple[int, ...], tuple[int, ...]]):
    """Remembers no prefix, so none is reused."""

    def setdefault(self, key: tuple[int, ...], default: tuple[int, ...] = ()) -> tuple[int, ...]:
        del key
        return default


def compare(family: str, case: str, requests: list[Request], reference: Reference) -> Row:
    """Compare served requests with the reference. A model whose output depends on nothing does not pass."""
    largest, wrong = 0.0, ""
    for request in requests:
        tokens, logprobs = reference.run(request.prompt)
        if request.output != tokens and not wrong:
            wrong = f"a prompt of {len(request.prompt)} tokens gave {request.output}, not {tokens}"
        for i, (found, wanted) in enumerate(zip(request.logprobs, logprobs, strict=True)):
            if request.output[:i] != tokens[:i]:
                break  # the texts differ from here on, so their logits are not comparable
            line = torch.tensor([found[token] for token in range(VOCAB)])
            largest = max(largest, float((line - wanted).abs().max()))
    outputs = [reference.run(request.prompt)[0] for request in requests]
    if not any(len(set(tokens)) > 1 for tokens in outputs):
        wrong = "the greedy output is one repeated token, so it proves nothing"
    if min(reference.early_difference(request.prompt) for request in requests) < 20 * TOLERANCE:
        wrong = "an early token makes no difference, so it proves nothing"
    if not wrong and largest > TOLERANCE:
        wrong = f"logits differ by {largest:.2g}"
    return Row(family, case, not wrong, largest, wrong)


@contextmanager
def positions_off_by_one(driver: Driver) -> Iterator[None]:
    """Shift the positions of all tokens after a row's first step by one: an error that `compare` must detect."""
    from engine.model.runtime import attention_interface

    run, later = attention_interface.run_model, torch.zeros(0)

    def note(batch: Any) -> None:
        nonlocal later
        later = torch.from_numpy((batch.num_computed_tokens > 0)[batch.row_of])

    def shifted(model: Any, forward: Any, arguments: dict[str, Any]) -> Any:
        return run(model, forward, {**arguments, "position_ids": arguments["position_ids"] + later})

    attention_interface.run_model = shifted
    try:
        with _before_forward(driver, note):
            yield
    finally:
        attention_interface.run_model = run


@contextmanager
def a_block_zeroed(driver: Driver) -> Iterator[None]:
    """Set the keys and values of a row's first block to zero once it decodes."""

    def lose(batch: Any) -> None:
        cache = driver.executor._runner._backend._cache
        for row in (batch.num_computed_tokens >= driver.block_size).nonzero()[0]:
            for layer in (*cache.keys, *cache.values):
                layer[batch.tables[:, row, 0]] = 0

    with _before_forward(driver, lose):
        yield


@contextmanager
def windows_off_by_one() -> Iterator[None]:
    """Layers with a window see one token more."""
    from engine.kernels import attention

    make = attention.make_plan

    def wider(ragged: Any, layout: Any, window: int | None = None, spans: Any = ()) -> Any:
        return make(ragged, layout, None if window is None else window + 1, spans)

    attention.make_plan = wider
    try:
        yield
    finally:
        attention.make_plan = make


@contextmanager
def _before_forward(driver: Driver, change: Callable[[Any], None]) -> Iterator[None]:
    backend: Any = driver.executor._runner._backend
    forward = backend.forward

    def changed(batch: Any) -> None:
        change(batch)
        forward(batch)

    backend.forward = changed
    try:
        yield
    finally:
        del backend.forward
