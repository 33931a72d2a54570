"""Prefill and decode replicas at random: tokens as without, whatever is lost on the way and whichever replica dies."""

import asyncio
from collections.abc import Iterator
from random import Random
from typing import Any

from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.errors import EngineDeadError
from tests.engine.fake_executor import expected_tokens
from tests.engine.frontend.disaggregated_fleet import DisaggregatedFleet

LONG = list(range(1, 38))  # 37 tokens


@st.composite
def traffic(draw: Any) -> Iterator[Any]:
    """Prompts that share prefixes, with the turn of their arrival, and of their abort."""
    prompt = st.tuples(st.integers(0, 2), st.integers(1, 44)).map(lambda pair: [pair[0]] * 6 + LONG[: pair[1]])
    one = st.tuples(prompt, st.integers(1, 12), st.integers(0, 40), st.one_of(st.none(), st.integers(0, 60)))
    return draw(st.lists(one, min_size=1, max_size=8))


@settings(max_examples=150, deadline=None)
@given(
    traffic(),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([(0,), (0, 6), (9,)]),
    st.sampled_from([40, 65, 130]),
    st.sampled_from([(0, 0), (9, 0), (9, 40)]),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=3),
)
def test_each_request_gets_its_own_tokens(
    requests: Any,
    seed: int,
    faults: float,
    windows: tuple[int, ...],
    blocks: int,
    tiers: tuple[int, int],
    deaths: list[tuple[int, int]],
):
    asyncio.run(play(requests, Random(seed), faults, windows, (blocks, *tiers), dict(deaths)))


async def play(
    requests: Any,
    luck: Random,
    faults: float,
    windows: tuple[int, ...],
    blocks: tuple[int, int, int],
    deaths: dict[int, int],
) -> None:
    """`blocks`: of the KV cache, host memory and files."""
    fleet = DisaggregatedFleet(
        2, 2,
        delay=lambda: None if luck.random() < faults else luck.randint(0, 3),
        damage=lambda: luck.random() < faults / 4,
        num_blocks=blocks[0], host_blocks=blocks[1], disk_blocks=blocks[2], kv_windows=windows,
    )  # fmt: skip
    arrivals = sorted(enumerate(requests), key=lambda pair: pair[1][2])
    streams: dict[int, Any] = {}
    turn = 0
    while True:
        while arrivals and arrivals[0][1][2] <= turn:
            index, (prompt, max_tokens, *_) = arrivals.pop(0)
            streams[index] = fleet.add(prompt, max_tokens)
        for index, stream in streams.items():
            if requests[index][3] == turn:
                stream.close()
        if (number := deaths.get(turn)) is not None:
            if number in fleet.living and len(fleet.living) > 1:
                fleet.kill(number)
            elif number not in fleet.living:
                fleet.restart(number)
        turn += 1
        if not fleet.turn() and not arrivals:
            break
        assert turn < 20_000, "it never ends"
    failed = 0
    for index, (prompt, max_tokens, _, aborted) in enumerate(requests):
        expected = expected_tokens(prompt, min(max_tokens, 64 - len(prompt)))
        try:
            got = fleet.take(streams[index])
        except EngineDeadError:
            assert deaths
            failed += 1
            continue
        assert got == expected or (aborted is not None and got == expected[: len(got)])
    core = fleet.router.total_stats.core
    event(f"transfers: {core.kv_transfers > 0}, lost: {core.kv_transfers_lost > 0}, failed requests: {failed > 0}")
    spills = [stats.spill for number in fleet.living if (stats := fleet.cores[number].scheduler.stats(0.0)).spill]
    event(f"blocks found in host memory or files: {any(one and one.host_hits + one.disk_hits for one in spills)}")
    fleet.check_idle()
