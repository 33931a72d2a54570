"""Pipeline stages give the tokens of plain transformers, for every family and in every way of serving."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.columns import column
from engine.kernels.cpu import build
from engine.messages import Sampling, SlotAssignment, StepMessage
from engine.model.families import FAMILIES
from engine.model.stage import Stage
from engine.worker.slots import WorkerSlots
from engine.worker.stage_runners import AwaitedTokens
from tests.engine.worker.driver import MODELS, Driver, Request, build_model
from tests.engine.worker.parity import CASES, NEW, Reference, compare, prompts, serve
from tests.engine.worker.test_multiprocess import make_requests

MakeStaged = Callable[..., Driver]
CASES_OF_FUSED = ("chunked", "preempted")
ALL_CASES = {"llama", "gpt2", "gemma3_text"}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_every_family_equals_transformers(kind: str, tmp_path: Path, make_staged: MakeStaged) -> None:
    """A stage of one layer before one of two, or three of one each: windows and layer types differ between them."""
    reference = Reference(build_model(kind, tmp_path))
    driver = make_staged(tmp_path, 3 if kind in ALL_CASES else 2, kernels="torch")
    for case in CASES if kind in ALL_CASES else ("chunked",):
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row


@pytest.mark.parametrize(
    ("kind", "tied"),
    [("llama", True), *((kind, False) for kind, family in sorted(FAMILIES.items()) if family.fused)],
)
def test_the_fused_stack_equals_transformers(kind: str, tied: bool, tmp_path: Path, make_staged: MakeStaged) -> None:
    isas = build.supported_isas()
    if not isas:
        pytest.skip("the C++ kernels need AVX2 or NEON")
    reference = Reference(build_model(kind, tmp_path, head_dim=16, tie_word_embeddings=tied))
    driver = make_staged(tmp_path, 3, block_size=16, kernels=isas[0])
    assert driver.executor.kernels == f"{isas[0]}, fused stack"
    for case in CASES_OF_FUSED:
        row = compare(kind, case, serve(driver, case), reference)
        assert row.passed, row
    plain = [Request(prompt) for prompt in prompts(1)]  # whose tokens are chosen without their logits
    driver.run(plain, NEW, seed=3)
    assert [request.output for request in plain] == [reference.run(request.prompt)[0] for request in plain]


def test_drawn_tokens_and_penalties_are_those_of_one_rank(
    tmp_path: Path, make_staged: MakeStaged, make_driver: Callable[..., Driver]
) -> None:
    """Penalties need the tokens of earlier steps, which the last stage has sampled itself."""
    build_model("qwen2", tmp_path)
    alone, found = make_requests(), make_requests()
    make_driver(tmp_path, kernels="torch").run(alone, 12, seed=1, chunk=5, preempt=0.4)
    driver = make_staged(tmp_path, 2, kernels="torch")
    driver.run(found, 12, seed=2, chunk=5, preempt=0.4)
    assert driver.preemptions > 0
    assert [one.output for one in found] == [one.output for one in alone]


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_each_stage_proposes_the_same_draft_tokens(kernels: str, tmp_path: Path, make_staged: MakeStaged) -> None:
    """Prompts that repeat themselves, so that some draft tokens are accepted and others are not."""
    reference = Reference(build_model("llama", tmp_path, head_dim=16))
    driver = make_staged(
        tmp_path, 3, block_size=16, kernels=kernels, speculative="ngram", num_speculative_tokens=3
    )  # fmt: skip
    again = [prompt + reference.run(prompt)[0][:7] + prompt for prompt in prompts(1)[:4]]
    requests = [Request(prompt) for prompt in (*again, *prompts(1))]
    driver.run(requests, NEW, seed=5, preempt=0.4)
    assert driver.drafted > 0
    assert driver.preemptions > 0
    for request in requests:
        assert request.output[:NEW] == reference.run(request.prompt)[0]


# ----------------------------------------------------------------------------------------------------- awaited tokens


class Sent:
    """In place of the links: tokens that have been sent so far."""

    def __init__(self) -> None:
        self.stage = Stage(0, 2, 0, 1)
        self.tokens: list[list[int]] = []

    def receive_tokens(self, count: int) -> np.ndarray:
        assert self.tokens, "the stage would wait for tokens that the last one has not sampled"
        found = self.tokens.pop(0)
        assert len(found) == count
        return np.array(found)


def assigned(slot: int, generation: int, length: int = 3) -> SlotAssignment:
    tokens = column([7] * length)
    return SlotAssignment(slot, generation, tokens, length, 0, (column([1, 2, 3, 4]),), Sampling())


@pytest.fixture
def waiting() -> tuple[WorkerSlots, Sent, AwaitedTokens]:
    slots, sent = WorkerSlots(4, 16, 4), Sent()
    return slots, sent, AwaitedTokens(slots, sent, 3)  # type: ignore[arg-type]


def run_step(
    slots: WorkerSlots, awaited: AwaitedTokens, step: int, idle: tuple[int, ...] = (), **changes: object
) -> list[int]:
    """Run a step in which all other slots compute what they have; the slots that sample in it."""
    live = {one.slot: len(one.tokens) // 4 for one in changes.get("assigned_slots", ())}  # type: ignore[attr-defined]
    chunks = [(slot, count) for slot, count in live.items() if count != 1] + [(slot, 0) for slot in idle]
    message = StepMessage(step, chunks=column(chunks), **changes)  # type: ignore[arg-type]
    awaited.receive_before(message)
    batch = slots.begin_step(message)
    awaited.add(batch)
    return batch.sampling.tolist()


def test_tokens_are_received_before_the_step_that_needs_them(waiting: tuple[WorkerSlots, Sent, AwaitedTokens]) -> None:
    slots, sent, awaited = waiting
    assert run_step(slots, awaited, 1, assigned_slots=(assigned(0, 0),)) == [0]
    assert run_step(slots, awaited, 2, idle=(0,), assigned_slots=(assigned(1, 0),)) == [1]
    assert slots.num_tokens[0] == 3, "nothing needs the token"
    sent.tokens = [[50], [51]]
    assert run_step(slots, awaited, 3, idle=(0,)) == [1]
    assert slots.known_tokens(0).tolist() == [7, 7, 7, 50], "tokens come in order"
    assert slots.known_tokens(1).tolist() == [7, 7, 7, 51]


def test_a_slot_with_another_request_gets_no_token_of_the_last_one(
    waiting: tuple[WorkerSlots, Sent, AwaitedTokens],
) -> None:
    slots, sent, awaited = waiting
    run_step(slots, awaited, 1, assigned_slots=(assigned(0, 0), assigned(1, 0)))
    freed = column([0])
    assert run_step(slots, awaited, 2, idle=(1,), freed_slots=freed, assigned_slots=(assigned(0, 1, 5),)) == [0]
    sent.tokens = [[50, 51], [60]]
    assert run_step(slots, awaited, 3) == [0, 1]
    assert slots.known_tokens(0).tolist() == [7] * 5 + [60]
    assert slots.known_tokens(1).tolist() == [7, 7, 7, 51]


def test_accepted_draft_tokens_are_those_of_the_last_stage() -> None:
    """Of two slots with draft tokens one has another request by the time the tokens come."""
    slots, sent = WorkerSlots(2, 64, 4, max_draft_tokens=2), Sent()
    awaited = AwaitedTokens(slots, sent, 3)  # type: ignore[arg-type]
    prompt = [5, 6, 7, 5, 6]
    blocks = (column([*range(1, 12)]),)
    both = tuple(
        SlotAssignment(slot, 0, column([*prompt, 7]), len(prompt), len(prompt), blocks, Sampling()) for slot in range(2)
    )
    awaited.receive_before(first := StepMessage(1, assigned_slots=both))
    batch = slots.begin_step(first)
    assert batch.num_draft_tokens.tolist() == [2, 2]
    assert batch.ids.tolist() == [7, 5, 6] * 2
    awaited.add(batch)
    other = SlotAssignment(0, 1, column([9] * 3), 3, 0, blocks, Sampling())
    second = StepMessage(2, column([0]), (other,), chunks=column([[0, 3], [1, 0]]))
    awaited.receive_before(second)
    awaited.add(slots.begin_step(second))
    sent.tokens = [[50, 51, 52, 5, 8, 53]]
    third = StepMessage(3, chunks=column([[0, 0]]))
    awaited.receive_before(third)
    batch = slots.begin_step(third)
    assert slots.known_tokens(0).tolist() == [9] * 3
    assert slots.known_tokens(1).tolist() == [*prompt, 7, 5, 8]
    assert batch.slots.tolist() == [1]
    assert batch.num_computed_tokens.tolist() == [7]


def test_what_no_step_needs_is_received_once_it_must_have_been_sent(
    waiting: tuple[WorkerSlots, Sent, AwaitedTokens],
) -> None:
    """Requests of one token each: otherwise what was sent for them would wait for ever."""
    slots, sent, awaited = waiting
    run_step(slots, awaited, 1, assigned_slots=(assigned(0, 0),))
    run_step(slots, awaited, 2, freed_slots=column([0]))
    run_step(slots, awaited, 3)
    sent.tokens = [[50]]
    run_step(slots, awaited, 4)
    assert not sent.tokens


def test_hidden_states_are_taken_once() -> None:
    from engine.model.runtime.stage_states import StageStates

    layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    states = StageStates(layers)
    with pytest.raises(AssertionError, match="hasn't been called"):
        states.take_leaving()
    states.entering = torch.full((1, 2, 3), 5.0)
    hidden = torch.zeros(1, 2, 3)
    for layer in layers:
        hidden = layer(hidden)
    assert torch.equal(states.take_leaving(), torch.full((1, 2, 3), 5.0))
    with pytest.raises(AssertionError):
        states.take_leaving()
