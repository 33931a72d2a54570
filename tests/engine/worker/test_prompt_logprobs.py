"""Logprobs of prompt tokens, and tokens that are barred: against plain transformers, whatever the schedule."""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.columns import column, float32s, int32s
from engine.kernels.cpu import build
from engine.messages import Sampling, StepResult
from tests.engine.worker.driver import VOCAB, Driver, Request, build_model
from tests.engine.worker.test_multiprocess import DRIVEN, start

TOLERANCE = 5e-4  # float32 against float32 that was summed in another order
LENGTHS = (1, 2, 5, 33, 70)
WAYS: list[dict[str, Any]] = [
    {"kernels": "torch"},
    {"block_size": 16},  # the fused stack
    {"block_size": 16, "speculative": "ngram", "num_speculative_tokens": 3},
    {"block_size": 16, "size": 2, "ablate": DRIVEN},
]

needs_kernels = pytest.mark.skipif(not build.supported_isas(), reason="the CPU kernels need AVX2 or NEON")
Scored = dict[int, dict[int, tuple[list[int], list[float], int]]]  # by request and position


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("model")
    return folder, build_model("llama", folder, head_dim=16, intermediate_size=64)


@pytest.fixture(scope="module", params=WAYS, ids=["torch", "fused", "speculative", "two ranks"])
def driver(request: pytest.FixtureRequest, model: tuple[Path, Any]) -> Iterator[Driver]:
    if request.param.get("kernels") != "torch" and not build.supported_isas():
        pytest.skip("the CPU kernels need AVX2 or NEON")
    found = start(model[0], **{"size": 1, **request.param})
    yield found
    found.executor.shutdown()


class NothingShared(dict[Any, Any]):
    def setdefault(self, key: Any, default: Any = None) -> Any:
        return default


def score(driver: Driver, requests: list[Request], new: int, **run: Any) -> Scored:
    """Run requests, and collect what each was told of its prompt; what comes twice must be the same."""
    scored: Scored = defaultdict(dict)
    book = driver._book

    def booked(result: StepResult, work: list[tuple[Request, int]]) -> None:
        owners = {request.row: requests.index(request) for request, _ in work}
        for one in result.prompt_logprobs:
            table, mine = one.logprobs, scored[owners[one.owner]]
            assert one.generation == driver.generations[one.owner]
            ids, values = int32s(table.ids).reshape(-1, table.width), float32s(table.values).reshape(-1, table.width)
            for at, *found in zip(
                int32s(table.index).tolist(), ids.tolist(), values.tolist(), int32s(table.ranks).tolist(), strict=True
            ):
                first = mine.setdefault(at, found)  # type: ignore[arg-type]
                np.testing.assert_allclose(found[1], first[1], atol=TOLERANCE)
        book(result, work)

    driver._book = booked  # type: ignore[method-assign]
    try:
        driver.run(requests, new, prefixes=NothingShared(), **run)
    finally:
        del driver._book  # type: ignore[method-assign]
    return scored


def test_prompt_logprobs_are_those_of_transformers(driver: Driver, model: tuple[Path, Any]) -> None:
    prompts = [np.random.default_rng(n).integers(0, VOCAB, n).tolist() for n in LENGTHS]
    tops = [0, 3, 20, 1, 5]
    asked = [Request(prompt, Sampling(prompt_logprobs=top)) for prompt, top in zip(prompts, tops, strict=True)]
    others = [Request(prompt) for prompt in prompts]
    # Requests that want no more than tokens run beside them, and get what they get alone.
    scored = score(driver, [one for pair in zip(asked, others, strict=True) for one in pair], 6, seed=3, preempt=0.5)
    assert driver.preemptions > 0
    assert {n // 2 for n in scored} == {1, 2, 3, 4}, "the prompt of one token has nothing to tell"
    for number, (prompt, top) in enumerate(zip(prompts, tops, strict=True)):
        assert asked[number].output[:6] == others[number].output[:6]
        mine = scored[2 * number]
        assert sorted(mine) == list(range(1, len(prompt)))
        with torch.inference_mode():
            expected = torch.log_softmax(model[1](torch.tensor([prompt])).logits[0].float(), -1)
        for at, (ids, values, rank) in mine.items():
            line = expected[at - 1]
            assert ids[0] == prompt[at]
            assert len(ids) == top + 1
            np.testing.assert_allclose(values, line[ids], atol=TOLERANCE)
            np.testing.assert_allclose(values[1:], torch.topk(line, top).values, atol=TOLERANCE)
            assert rank == int((line > line[prompt[at]]).sum()) + 1


def greedy(model: Any, prompt: list[int], new: int, allowed: list[int], bad: list[tuple[int, ...]]) -> list[int]:
    """A plain statement of what may come: the most likely token that is allowed and completes no bad word."""
    output: list[int] = []
    for _ in range(new):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0, -1].float()
        barred = {word[-1] for word in bad if tuple(output[len(output) - len(word) + 1 :]) == word[:-1]}
        output.append(max((one for one in allowed if one not in barred), key=lambda one: float(logits[one])))
    return output


def test_what_is_barred_never_comes_and_the_rest_is_greedy(driver: Driver, model: tuple[Path, Any]) -> None:
    prompt = [5, 6, 7, 8, 5, 6, 7, 8]
    everything = list(range(VOCAB))
    free = greedy(model[1], prompt, 8, everything, [])
    some = [n for n in everything if n % 3 == 0]
    pair = (free[1], free[2])
    cases: list[tuple[list[int], list[tuple[int, ...]]]] = [
        (everything, []),
        (everything, [(free[0],)]),
        (everything, [pair, (free[0], free[1], free[2], free[3])]),
        (some, []),
        (some, [(token,) for token in free] + [(some[0], some[1])]),
    ]
    requests = [
        Request(prompt, Sampling(allowed=b"" if allowed is everything else column(allowed), bad_words=tuple(bad)))
        for allowed, bad in cases
    ]
    driver.run(requests, 8, seed=5, preempt=0.3)
    for request, (allowed, bad) in zip(requests, cases, strict=True):
        assert request.output[:8] == greedy(model[1], prompt, 8, allowed, bad)
    assert len({tuple(request.output[:8]) for request in requests}) >= 4


def test_drawn_tokens_keep_to_what_is_allowed(driver: Driver) -> None:
    params = Sampling(temperature=2.0, seed=4, allowed=column([3, 9, 70]), bad_words=((9,), (3, 3)))
    request = Request([1, 2, 3], params)
    driver.run([request], 30, seed=1)
    assert set(request.output) == {3, 70}
    assert (3, 3) not in set(zip(request.output, request.output[1:], strict=False))


def test_where_nothing_is_left_allowed_tokens_win(driver: Driver) -> None:
    for temperature in (0.0, 1.0):
        params = Sampling(temperature=temperature, allowed=column([3, 9]), bad_words=((3,), (9,)))
        request = Request([1, 2, 3], params)
        driver.run([request], 6, seed=1)
        assert set(request.output) <= {3, 9}
