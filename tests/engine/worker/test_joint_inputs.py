"""Several images of Molmo 2 in a prompt: all of their tokens attend to each other, also to those of later images."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.core.hashing import joint_range
from tests.engine.worker.driver import Prefixes, Request
from tests.engine.worker.mm_driver import MMDriver, MMRequest, Prompts, start
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import CACHED, CHUNKED, NEW, TOGETHER, MMReference, compare, swapped

KIND = "molmo2"
Model = tuple[MMDriver, Prompts, MMReference]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder, entry = tmp_path_factory.mktemp(KIND), MM_MODELS[KIND]
    reference = MMReference(entry.build(folder), entry)
    driver = start(folder)
    yield driver, Prompts(folder, entry), reference
    driver.executor.shutdown()


def alike(prompts: Prompts) -> list[MMRequest]:
    """Prompts with the same beginning and first image, of which only the first and the last are the same throughout."""
    begin, between, end = prompts.text(1, 5), prompts.text(2, 3), prompts.text(3, 4)
    return [
        prompts.request(begin, 1, between, 2, end),
        prompts.request(begin, 1, between, 0, end),
        prompts.request(begin, 1, prompts.text(4, 3), 2, end),
        prompts.request(begin, 1, between, 2, end, 0, end),
        prompts.request(begin, 1, end),
        prompts.request(begin, 1, between, 2, prompts.text(5, 6)),
    ]


def run(driver: MMDriver, requests: list[MMRequest], *, chunk: int = 0) -> None:
    prefixes: Prefixes = {}
    for request in requests:
        driver.run([request], NEW, seed=1, chunk=chunk, preempt=0, prefixes=prefixes)


def test_chunks_leave_several_images_whole(model: Model) -> None:
    driver, prompts, reference = model
    requests, before = alike(prompts), driver.split
    run(driver, requests, chunk=6)
    assert driver.split == before
    row = compare(KIND, CHUNKED, requests, reference)
    assert row.passed, row


def test_prefixes_are_shared_only_between_prompts_with_the_same_images(model: Model) -> None:
    driver, prompts, reference = model
    requests, first = alike(prompts), len(driver.hits)
    run(driver, requests)
    assert driver.hits[first : first + 5] == [0, 4, 4, 4, 4], "one block of text before the images"
    joint = joint_range(requests[-1].inputs)
    assert joint is not None
    assert driver.hits[-1] > joint[1] - driver.block_size
    row = compare(KIND, CACHED, requests, reference)
    assert row.passed, row


def test_that_is_needed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first image that prompts shared whatever follows it would give wrong answers."""

    def key(request: MMRequest, end: int) -> tuple[int, ...]:
        return (*(hash(one.hash) for one in request.inputs if one.offset < end), *Request.key(request, end))

    driver, prompts, reference = model
    requests = alike(prompts)
    monkeypatch.setattr(MMRequest, "key", key)
    run(driver, requests)
    assert not compare(KIND, CACHED, requests, reference).passed


def test_exchanged_images_are_seen(model: Model) -> None:
    driver, prompts, reference = model
    requests = swapped(alike(prompts)[:3])
    run(driver, requests)
    for request in requests:
        request.inputs = (request.inputs[1], request.inputs[0], *request.inputs[2:])
    assert not compare(KIND, TOGETHER, requests, reference).passed


def test_times_between_frames_of_a_video_do_not_attend_to_later_frames(tmp_path: Path) -> None:
    kind = "molmo2/video"
    entry = MM_MODELS[kind]
    reference = MMReference(entry.build(tmp_path), entry)
    driver = start(tmp_path)
    try:
        prompts = Prompts(tmp_path, entry)
        requests = [[prompts.request(prompts.text(1, 5), 0, prompts.text(2, 4))] for _ in range(2)]
        driver.run(list(requests[0]), NEW, seed=1, chunk=0, preempt=0)
        slots: Any = driver.executor._runner._slots
        slots._tokens_of_inputs = dataclasses.replace(slots._tokens_of_inputs, joint_ids=None)
        driver.run(list(requests[1]), NEW, seed=1, chunk=0, preempt=0)
    finally:
        driver.executor.shutdown()
    assert compare(kind, TOGETHER, list(requests[0]), reference).passed
    assert not compare(kind, TOGETHER, list(requests[1]), reference).passed
