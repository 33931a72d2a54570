"""Every multimodal family, served in several ways, against plain transformers with the tensors of its inputs."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from engine.config import EngineConfig
from engine.model.families import family_of
from engine.model.model_info import read_hf_config
from engine.multimodal.families import MM_FAMILIES
from engine.worker.slots import StepBatch
from tests.engine.worker.driver import VOCAB
from tests.engine.worker.mm_driver import MMDriver, MMRequest, Prompts, start
from tests.engine.worker.mm_model import MMModel, widened
from tests.engine.worker.parity import TOLERANCE, Row, _Forgetful

NEW = 8
MOST = 9  # tokens of a chunk
ALONE, TOGETHER, CHUNKED, CACHED = "alone", "several inputs", "split over chunks", "cached input"
REUSED, PREEMPTED, RANKS = "encoder output reused", "preempted", "tp 2"
CASES = (ALONE, TOGETHER, CHUNKED, CACHED, REUSED, PREEMPTED)


class MMReference:
    """The output of plain transformers."""

    def __init__(self, model: Any, entry: MMModel):
        self._model, self._entry = model, entry
        self._known: dict[tuple[Any, ...], tuple[list[int], torch.Tensor]] = {}

    @torch.inference_mode()
    def run(self, request: MMRequest) -> tuple[list[int], torch.Tensor]:
        """Greedy output, and log-probabilities [NEW, vocabulary] of each of its tokens."""
        key = (*request.prompt, *(one.hash for one in request.inputs))
        if key not in self._known:
            ids = torch.tensor([request.prompt])
            out = self._model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW,
                pad_token_id=0, **self._entry.reference(ids, request.processed),
            )  # fmt: skip
            whole = out[:, :-1]
            arguments = self._entry.reference(whole, request.processed)
            logits = self._model(input_ids=whole, attention_mask=torch.ones_like(whole), **arguments).logits
            found = torch.log_softmax(logits[0, len(request.prompt) - 1 :].float(), -1)
            self._known[key] = out[0, len(request.prompt) :].tolist(), found
        return self._known[key]


def not_applicable(entry: MMModel, case: str) -> str:
    """Why a case can't occur with a family; empty if it can."""
    if case == CHUNKED:
        return entry.whole
    return entry.no_prefixes if case == CACHED else ""


def serve(driver: MMDriver, prompts: Prompts, case: str) -> list[MMRequest]:
    """Run the samples in the way of a case, and check that the case occurred."""
    requests = prompts.samples()
    driver.forget_embeddings()
    if case == ALONE:
        for request in requests:
            driver.run([request], NEW, seed=0, chunk=0, preempt=0)
    elif case == TOGETHER:
        driver.run(requests, NEW, seed=2, chunk=0, preempt=0, prefixes=_Forgetful())
    elif case == CHUNKED:
        before = driver.split
        driver.run(requests, NEW, seed=3, chunk=MOST, preempt=0, prefixes=_Forgetful())
        assert driver.split > before, "no input was split"
    elif case == CACHED:
        prefixes: dict[tuple[int, ...], tuple[int, ...]] = {}
        driver.run(prompts.samples(), NEW, seed=4, preempt=0, chunk=0, prefixes=prefixes)
        driver.forget_embeddings()
        within, hits, encoded = driver.hits_within, len(driver.hits), driver.encoded
        driver.run(requests, NEW, seed=5, preempt=0, chunk=0, prefixes=prefixes)
        ends = [one.inputs[0].offset + one.inputs[0].length if one.inputs else 0 for one in requests]
        assert any(hit >= end > 0 for hit, end in zip(driver.hits[hits:], ends, strict=True)), "no hit after an input"
        # A prompt that goes on differently after the same input shares only whole blocks.
        other = prompts.request(requests[0].prompt[:5], 0, prompts.text(11, 3))
        driver.run([other], NEW, seed=5, preempt=0, chunk=0, prefixes=prefixes)
        requests.append(other)
        assert driver.hits_within > within or _aligned(requests[0]), "no hit ended within an input"
        assert driver.encoded - encoded <= 2 * len(requests)
    elif case == REUSED:
        first, second = requests[0], requests[2]
        driver.run([first], NEW, seed=0, chunk=0, preempt=0, prefixes=_Forgetful())
        before = driver.encoded
        driver.run([second], NEW, seed=0, chunk=0, preempt=0, prefixes=_Forgetful())
        assert driver.encoded == before, "the input was encoded again"
        return [first, second]
    else:
        before, encoded = driver.preemptions, driver.encoded
        chunk = MOST if not any(one.bidirectional for request in requests for one in request.inputs) else 0
        driver.run(requests, NEW, seed=6, preempt=0.6, chunk=chunk, prefixes=_Forgetful())
        distinct = len({one.hash for request in requests for one in request.inputs})
        assert driver.preemptions > before, "nothing was preempted"
        assert driver.encoded - encoded > distinct, "nothing was encoded again"
    return requests


def _aligned(request: MMRequest) -> bool:
    """Whether the first input ends with a block."""
    first = request.inputs[0]
    return (first.offset + first.length) % 4 == 0


def compare(family: str, case: str, requests: list[MMRequest], reference: MMReference) -> Row:
    """Compare served requests with the reference."""
    largest, wrong = 0.0, ""
    for request in requests:
        tokens, logprobs = reference.run(request)
        if request.output != tokens and not wrong:
            wrong = f"a prompt of {len(request.prompt)} tokens gave {request.output}, not {tokens}"
        for i, (found, wanted) in enumerate(zip(request.logprobs, logprobs, strict=True)):
            if request.output[:i] != tokens[:i]:
                break  # the texts differ from here on, so their logits are not comparable
            line = torch.tensor([found[token] for token in range(VOCAB)])
            largest = max(largest, float((line - wanted).abs().max()))
    if not any(len(set(reference.run(request)[0])) > 1 for request in requests):
        wrong = "the greedy output is one repeated token, so it proves nothing"
    if not wrong and largest > TOLERANCE:
        wrong = f"logits differ by {largest:.2g}"
    return Row(family, case, not wrong, largest, wrong)


def input_effect(prompts: Prompts, reference: MMReference) -> float:
    """How much the log-probabilities after a prompt change with its input."""
    start, end = prompts.text(1, 5), prompts.text(2, 7)
    first, second = (reference.run(prompts.request(start, number, end))[1][0] for number in (0, 1))
    return float((first - second).abs().max())


def swapped(requests: list[MMRequest]) -> list[MMRequest]:
    """The requests with the features of their first two inputs exchanged; others are left out."""
    found = []
    for request in requests:
        if len(request.inputs) > 1 and request.inputs[0].hash != request.inputs[1].hash:
            first, second, *rest = request.inputs
            one = msgspec.structs.replace(first, hash=second.hash, features=second.features)
            two = msgspec.structs.replace(second, hash=first.hash, features=first.features)
            request.inputs = (one, two, *rest)
            found.append(request)
    return found


SWAPPED, SHIFTED, NO_MROPE = "swapped inputs fail", "shifted embeddings fail", "no M-RoPE fails"
CONTROLS = (SWAPPED, SHIFTED, NO_MROPE)
FUSED, FUSED_RANKS = "fused stack", "fused stack, tp 2"
FUSED_BLOCK = 16


def rows_of(kind: str, entry: MMModel, folder: Path, ranks: tuple[int, ...] = (1, 2)) -> Iterator[Row]:
    """The rows of a family, the mistakes that must be seen included; a case that raises is a failed row."""
    reference = MMReference(entry.build(folder), entry)
    prompts = Prompts(folder, entry)
    for size in ranks:
        driver = start(folder, size)
        try:
            for case in CASES if size == 1 else (RANKS,):
                yield _row(kind, case, entry, prompts, driver, reference)
            if size == 1:
                mrope = MM_FAMILIES[kind.partition("/")[0]].mrope
                for case in CONTROLS if mrope else CONTROLS[:2]:
                    yield control(kind, case, prompts, driver, reference)
        finally:
            driver.executor.shutdown()


def fused_rows(kind: str, entry: MMModel, folder: Path, ranks: tuple[int, ...] = (1, 2)) -> Iterator[Row]:
    """The rows of a family whose decoder is computed by the fused stack: chunks, preemptions, mistakes on purpose."""
    folder.mkdir(exist_ok=True)
    model = entry.build(folder)
    text_config = read_hf_config(folder, EngineConfig(model=str(folder))).get_text_config(decoder=True)
    decoder = family_of(text_config.model_type)
    if decoder is None or not decoder.fused or not hasattr(model, "config"):
        yield Row(kind, FUSED, True, float("nan"), "not applicable: the fused stack has no such decoder")
        return
    reference, prompts = MMReference(widened(model, folder), entry), Prompts(folder, entry)
    for size in ranks:
        case = FUSED if size == 1 else FUSED_RANKS
        driver = start(folder, size, FUSED_BLOCK, kernels="auto")
        try:
            if "fused" not in driver.executor.kernels:
                yield Row(kind, case, True, float("nan"), f"not applicable: {driver.executor.kernels}")
                continue
            row = _row(kind, case, entry, prompts, driver, reference)
            if size == 1:
                controls = (SHIFTED, NO_MROPE) if MM_FAMILIES[kind.partition("/")[0]].mrope else (SHIFTED,)
                seen = [control(kind, one, prompts, driver, reference) for one in controls]
                row = next((one for one in seen if not one.passed), row) if row.passed else row
            yield row
        finally:
            driver.executor.shutdown()


def _row(kind: str, case: str, entry: MMModel, prompts: Prompts, driver: MMDriver, reference: MMReference) -> Row:
    if reason := not_applicable(entry, case):
        return Row(kind, case, True, float("nan"), f"not applicable: {reason}")
    try:
        row = compare(kind, case, serve(driver, prompts, case if case in CASES else PREEMPTED), reference)
    except AssertionError as error:
        return Row(kind, case, False, float("nan"), str(error))
    if row.passed and input_effect(prompts, reference) < 20 * TOLERANCE:
        return dataclasses.replace(row, passed=False, note="another input makes no difference, so it proves nothing")
    return row


def control(kind: str, case: str, prompts: Prompts, driver: MMDriver, reference: MMReference) -> Row:
    """A mistake on purpose; the row passes if the comparison fails."""
    driver.forget_embeddings()
    requests = swapped(prompts.samples()) if case == SWAPPED else prompts.samples()
    mistakes = {SHIFTED: embeddings_shifted, NO_MROPE: mrope_dropped}
    with mistakes[case](driver) if case in mistakes else nullcontext():
        driver.run(requests, NEW, seed=0, chunk=0, preempt=0)
    if case == SWAPPED:
        for request in requests:
            request.inputs = (request.inputs[1], request.inputs[0], *request.inputs[2:])
    grids = [one.grid for request in requests for one in request.inputs]
    assert case != NO_MROPE or any(rows * columns > 1 for _, rows, columns in grids), "single embeddings have no rows"
    row = compare(kind, case, requests, reference)
    return Row(kind, case, not row.passed, row.max_logit_difference, "the mistake was not seen" if row.passed else "")


@contextmanager
def embeddings_shifted(driver: MMDriver) -> Iterator[None]:
    """Each embedding is put at the token of the next one."""

    def shift(batch: StepBatch) -> StepBatch:
        if batch.mm is None:
            return batch
        rolled = torch.roll(batch.mm.embeddings, 1, 0)
        return _replaced(batch, mm=_replaced(batch.mm, embeddings=rolled))

    with _changed_batches(driver, shift):
        yield


@contextmanager
def mrope_dropped(driver: MMDriver) -> Iterator[None]:
    """Rotary positions are those of plain text."""

    def drop(batch: StepBatch) -> StepBatch:
        return _replaced(batch, rotary_positions=np.repeat(batch.positions[None], 3, 0))

    with _changed_batches(driver, drop):
        yield


@contextmanager
def _changed_batches(driver: MMDriver, change: Callable[[StepBatch], StepBatch]) -> Iterator[None]:
    backend: Any = driver.executor._runner._backend
    forward = backend.forward
    backend.forward = lambda batch: forward(change(batch))
    try:
        yield
    finally:
        del backend.forward


def _replaced(value: Any, **changes: Any) -> Any:
    return dataclasses.replace(value, **changes)
