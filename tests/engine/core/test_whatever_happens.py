"""The core under random arrivals, aborts and preemptions: each request gets the tokens it would get alone."""

import re
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.config import ABLATIONS
from engine.core.policy import MAX_BURST
from engine.messages import FinishReason, MMInputRef
from engine.resolved_config import ResolvedConfig
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import expected_tokens

MAX_LEN = 32
PLACEHOLDER = 3


@dataclass(frozen=True)
class Asked:
    """One random request; turns are calls of the core's step()."""

    prompt: list[int]
    mm_inputs: tuple[MMInputRef, ...]
    max_tokens: int
    stop_ids: frozenset[int]
    arrives: int
    aborted_after: int | None
    priority: int
    salt: str

    def expected(self) -> list[int]:
        room = MAX_LEN - len(self.prompt)
        return expected_tokens(self.prompt, min(self.max_tokens, room), self.stop_ids, self.mm_inputs)


images = st.tuples(st.sampled_from([b"aa", b"bb", b"cc"]), st.sampled_from([1, 3, 4]), st.booleans())
pieces = st.one_of(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), images)


@st.composite
def prompts(draw: Any) -> tuple[list[int], tuple[MMInputRef, ...]]:
    """Few tokens and few images, so that prefixes are shared often; an image of one name has one length."""
    tokens: list[int] = []
    mm_inputs: list[MMInputRef] = []
    for piece in draw(st.lists(pieces, min_size=1, max_size=20)):
        if isinstance(piece, int):
            tokens.append(piece)
        elif len(tokens) < 16:
            name, length, bidirectional = piece
            mm_inputs.append(MMInputRef(name + bytes([length]), len(tokens), length, bidirectional))
            tokens += [PLACEHOLDER] * length
    return tokens[:20] or [0], tuple(mm_input for mm_input in mm_inputs if mm_input.offset + mm_input.length <= 20)


@st.composite
def asked(draw: Any) -> Asked:
    prompt, mm_inputs = draw(prompts())
    return Asked(
        prompt,
        mm_inputs if draw(st.booleans()) else (),
        max_tokens=draw(st.integers(1, 14)),
        stop_ids=draw(st.frozensets(st.integers(0, 49), max_size=10)),
        arrives=draw(st.integers(0, 6)),
        aborted_after=draw(st.one_of(st.none(), st.integers(0, 12))),
        priority=draw(st.integers(-1, 1)),
        salt=draw(st.sampled_from(["", "", "tenant"])),
    )


requests = st.lists(asked(), min_size=1, max_size=8)

ablations = st.one_of(st.just(frozenset()), st.just(frozenset(ABLATIONS)), st.frozensets(st.sampled_from([*ABLATIONS])))


@st.composite
def configs(draw: Any, drafts: bool = False) -> ResolvedConfig:
    # The smallest pools hold just one request of the greatest length.
    blocks, size = draw(st.sampled_from([(16, 2), (8, 4), (10, 4), (64, 4)]))
    removed = draw(ablations)
    least = MAX_LEN if "no-chunking" in removed else 4
    windows = draw(st.sampled_from([(0,), (0,), (5,), (9,), (0, 3), (0, 7, 7), (2, 6)]))
    return resolved(
        num_blocks=blocks * len(windows) + 1,
        kv_windows=windows,
        block_size=size,
        max_num_batched_tokens=draw(st.integers(least, least + 12)),
        max_model_len=MAX_LEN,
        enable_prefix_caching="no-prefix-cache" not in removed and draw(st.booleans()),
        ablations=removed,
        scheduler_steps=draw(st.sampled_from([1, 1, 3])) if "no-run-ahead" in removed else 1,
        draft_tokens=draw(st.sampled_from([0, 1, 5])) if drafts and not removed & {"full-state", "no-run-ahead"} else 0,
        scheduling_policy=draw(st.sampled_from(["fcfs", "priority"])),
        # Without chunking all inputs of a prompt must fit.
        encoder_cache_tokens=20 if "no-chunking" in removed else draw(st.sampled_from([4, 6, 20])),
    )


def play(driver: Driver, requests: list[Asked], eager: list[bool]) -> list[int]:
    """Let everything happen at its turn, to the end; `eager` turns deliver no result. Returns the handles."""
    arrivals = sorted(enumerate(requests), key=lambda pair: pair[1].arrives)
    handles: dict[int, int] = {}
    turn = 0
    while arrivals or driver.core.has_work:
        while arrivals and arrivals[0][1].arrives <= turn:
            index, asked = arrivals.pop(0)
            handles[index] = driver.add(
                asked.prompt,
                asked.max_tokens,
                tuple(asked.stop_ids),
                priority=asked.priority,
                cache_salt=asked.salt,
                mm_inputs=asked.mm_inputs,
            )
        for index, handle in handles.items():
            after = requests[index].aborted_after
            if after is not None and turn == requests[index].arrives + after:
                driver.abort(handle)
        driver.turn()
        if not (turn < len(eager) and eager[turn]):
            driver.advance()
        turn += 1
        assert turn < 5000, "no progress"
    return [handles[index] for index in range(len(requests))]


@settings(max_examples=500, deadline=None)
@given(requests, configs(drafts=True), st.sampled_from([0.001, 0.004, 1.0]), st.lists(st.booleans(), max_size=30))
def test_each_request_gets_its_own_tokens(
    requests: list[Asked], config: ResolvedConfig, step_s: float, eager: list[bool]
):
    driver = Driver(config, lambda *_: step_s)
    handles = play(driver, requests, eager)
    for asked, handle in zip(requests, handles, strict=True):
        expected, got, end = asked.expected(), driver.tokens[handle], driver.finished[handle]
        if end.reason == FinishReason.ABORT:
            assert asked.aborted_after is not None
            assert got == expected[: len(got)]
        else:
            assert got == expected
    longest = max((message.num_steps for message in driver.worker.steps), default=1)
    event(f"preempted: {driver.stats.preemptions > 0}, found a prefix: {driver.stats.prefix_hits > 0}")
    event(f"draft tokens: {driver.stats.num_draft_tokens > 0}, some accepted: {driver.stats.num_accepted_tokens > 0}")
    event(f"burst: {longest > 1}, ablations: {len(config.ablations)}, encoded: {bool(driver.worker.encoded)}")
    assert not driver.core.scheduler.encoder_cache.cache.references
    assert max(driver.worker.batch_tokens, default=0) <= config.max_num_batched_tokens
    assert max(map(len, driver.worker.slot_tokens), default=0) <= config.max_num_seqs
    assert driver.core.scheduler.pool.num_free == config.num_blocks - 1, "every block came back"
    assert not driver.core.scheduler.requests
    assert not driver.worker.slots or not driver.core.scheduler.has_work


@settings(max_examples=200, deadline=None)
@given(
    requests, configs(drafts=True), st.sampled_from([0.001, 1.0]), st.lists(st.booleans(), max_size=30), st.randoms()
)
def test_inputs_that_cannot_be_encoded_end_their_requests_only(
    requests: list[Asked], config: ResolvedConfig, step_s: float, eager: list[bool], luck: Random
):
    driver = Driver(config, lambda *_: step_s)
    worker, scheduler = driver.worker, driver.core.scheduler
    worker.fails = lambda: luck.random() < 0.4
    handles = play(driver, requests, eager)
    failed = 0
    for asked, handle in zip(requests, handles, strict=True):
        expected, got, end = asked.expected(), driver.tokens[handle], driver.finished[handle]
        if end.reason == FinishReason.NOT_ENCODED:
            failed += 1
            assert re.fullmatch(r"multimodal input \d could not be encoded: the tower fails", end.error)
            assert got == expected[: len(got)], "before a preemption"
        elif end.reason == FinishReason.ABORT:
            assert got == expected[: len(got)]
        else:
            assert got == expected
    event(f"faults: {worker.num_faults > 0}, failed: {failed > 0}, found a prefix: {driver.stats.prefix_hits > 0}")
    assert not failed or worker.num_faults
    assert not [block for block in scheduler.pool.block_of.values() if worker.has_fault(block)]
    assert not worker.faulty & set(scheduler.encoder_cache.cache.size_of)
    assert not scheduler.encoder_cache.cache.references
    assert scheduler.pool.num_free == config.num_blocks - 1, "every block came back"
    assert not scheduler.requests


@settings(max_examples=200, deadline=None)
@given(requests, configs(), st.sampled_from([0.001, 1.0]))
def test_no_token_is_computed_twice_or_not_at_all(requests: list[Asked], config: ResolvedConfig, step_s: float):
    """What steps computed is what requests needed: prompts less what was cached, answers less their last token."""
    driver = Driver(config, lambda *_: step_s)
    calm = [replace(one, aborted_after=None, priority=0) for one in requests]
    handles = play(driver, calm, [])
    computed = sum(driver.worker.batch_tokens)
    needed = sum(
        len(asked.prompt) - driver.cached[handle] + len(driver.tokens[handle]) - 1
        for asked, handle in zip(calm, handles, strict=True)
    )
    stopped = sum(end.reason == FinishReason.STOP for end in driver.finished.values())
    if driver.stats.preemptions == 0:
        assert needed <= computed <= needed + stopped * (MAX_BURST + 1)
        assert stopped or computed == needed
    else:  # one that is admitted again may find blocks that others have computed since
        assigned = [slot for message in driver.worker.steps for slot in message.assigned_slots]
        found = sum(slot.num_computed_tokens for slot in assigned)
        whole = sum(len(one.prompt) + len(driver.tokens[handle]) - 1 for one, handle in zip(calm, handles, strict=True))
        assert computed + found >= whole
