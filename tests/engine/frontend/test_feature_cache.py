"""Feature caches of front ends and their mirrors in the cores, under any interleaving."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from engine.errors import SharedMemoryFullError
from engine.frontend.feature_cache import PreparedInput
from engine.multimodal.pool_protocol import Done
from engine.multimodal.types import Media
from tests.engine.frontend.input_fleet import InputFleet
from tests.engine.frontend.interleavings import TINY, run_interleaving


@pytest.mark.parametrize(("fleet", "count"), [((1, 1, TINY), 40), ((2, 2, TINY), 80), ((2, 2, 0), 20)])
def test_no_mirror_drifts_under_any_interleaving(fleet: tuple[int, int, int], count: int) -> None:
    """`make faults ONLY=caches` runs 1,000."""
    assert sum(run_interleaving(seed, *fleet) for seed in range(count)) > count


async def serve_in_turn(fleet: InputFleet, *requests: list[int]) -> None:
    """Serve requests one after the other."""
    for pictures in requests:
        fleet.start(0, pictures)
        await fleet.finish()


def test_the_same_picture_is_processed_once_and_encoded_once() -> None:
    async def main() -> None:
        fleet = InputFleet(0, 1, 1, 1 << 20)
        fleet.start(0, [1])
        fleet.start(0, [1])  # while the first is processed
        await fleet.finish()
        await serve_in_turn(fleet, [1])
        front, core = fleet.front_ends[0], fleet.cores[0].scheduler
        assert front.pool.processed == [1]
        assert len(fleet.workers[0].encoded) == 1
        assert (front.counters.get("queries"), front.counters.get("hits")) == (3, 2)
        stats = core.stats(0.0).mm
        assert stats is not None
        assert (stats.mirror_queries, stats.mirror_hits, stats.mirror_misses) == (3, 2, 0)
        # The last request finds all blocks of its picture in the prefix cache.
        assert stats.encoder_queries == stats.encoder_hits + 1
        assert fleet.ended["served"] == 3
        await fleet.close()

    asyncio.run(main())


def test_two_pictures_behind_equal_tokens_share_nothing() -> None:
    async def main() -> None:
        fleet = InputFleet(0, 1, 1, 1 << 20)
        await serve_in_turn(fleet, [1], [2], [1])
        front, core = fleet.front_ends[0], fleet.cores[0].scheduler
        assert front.pool.processed == [1, 2]
        assert len(set(fleet.workers[0].encoded)) == 2
        assert fleet.workers[0].pictures != {}
        block = fleet.cores[0].config.block_size
        assert core.counters.prefix_hits == block, "only the third request may find a block"
        await fleet.close()

    asyncio.run(main())


def test_the_same_picture_at_another_offset_shares_no_block() -> None:
    async def main() -> None:
        fleet = InputFleet(0, 1, 1, 1 << 20)
        await serve_in_turn(fleet, [1, 2], [2, 1])
        assert sorted(fleet.front_ends[0].pool.processed) == [1, 2]
        assert fleet.cores[0].scheduler.counters.prefix_hits == 0
        await fleet.close()

    asyncio.run(main())


def test_requests_with_a_picture_go_where_its_blocks_are() -> None:
    async def main() -> None:
        fleet = InputFleet(0, 1, 2, 1 << 20)
        await serve_in_turn(fleet, *([one] for one in (1, 2, 1, 2, 1, 2)))
        assert [len(worker.encoded) for worker in fleet.workers] == [1, 1]
        await fleet.close()

    asyncio.run(main())


def test_without_a_cache_each_request_processes_its_picture() -> None:
    async def main() -> None:
        fleet = InputFleet(0, 1, 1, 0)
        await serve_in_turn(fleet, [1], [1])
        front = fleet.front_ends[0]
        assert front.pool.processed == [1, 1]
        assert (front.counters.get("queries"), front.counters.get("hits")) == (2, 0)
        assert front.counters.get("bytes") == 0
        await fleet.close()

    asyncio.run(main())


def test_a_request_that_a_core_fails_gets_its_features_anew() -> None:
    """If a mirror ever drifts, a retry succeeds."""

    async def main() -> None:
        fleet = InputFleet(0, 1, 1, 1 << 20)
        await serve_in_turn(fleet, [1])
        mirror = fleet.cores[0].scheduler.features
        mirror._links.clear()  # as by a mistake
        fleet.start(0, [1])
        with pytest.raises(AssertionError, match="are not in the engine"):
            await fleet.finish()
        assert mirror.misses == 2, "of the request, and of the message that evicts what is not there"
        fleet.requests.clear()
        fleet.errors.clear()
        await serve_in_turn(fleet, [1])
        assert fleet.ended == {"served": 2, "aborted": 0, "failed": 1}
        for folder in fleet.folders:
            folder.remove()
        fleet.front_ends[0].router.close()

    asyncio.run(main())


@pytest.mark.parametrize("other_uses_it", [False, True])
def test_an_input_that_can_not_be_encoded_is_processed_anew(other_uses_it: bool) -> None:
    """As soon as no request uses it."""

    async def main() -> None:
        fleet = InputFleet(0, 1, 1, 1 << 20, max_num_batched_tokens=8)
        front, worker = fleet.front_ends[0], fleet.workers[0]
        worker.fails = lambda: len(worker.encoded) == 1
        await serve_in_turn(fleet, [1])
        cached = list(front.cache._by_hash.values())
        assert not cached, "its features are still there"
        assert fleet.ended == {"served": 0, "aborted": 0, "failed": 1}
        worker.fails = lambda: False
        if other_uses_it:
            other = await front_end_keeps(fleet, 1)
            other.cached.failed = True
            await serve_in_turn(fleet, [1])
            assert front.pool.processed == [1, 1]
            other.release()
        await serve_in_turn(fleet, [1])
        assert front.pool.processed == ([1, 1, 1] if other_uses_it else [1, 1])
        await fleet.close()

    asyncio.run(main())


async def front_end_keeps(fleet: InputFleet, picture: int) -> PreparedInput:
    """A request that isn't sent yet uses a picture."""
    front = fleet.front_ends[0]
    preparing = asyncio.ensure_future(front.pipeline.prepare(Media("image", bytes([picture]) * 50), 1))
    while not preparing.done():
        front.pool.work()
        await asyncio.sleep(0)
    return preparing.result()


def test_a_full_shared_memory_empties_the_cache_before_a_request_fails() -> None:
    async def main() -> None:
        fleet = InputFleet(0, 1, 1, 1 << 20)
        await serve_in_turn(fleet, [1])
        front = fleet.front_ends[0]
        submit, refused = front.pool.submit, []

        async def full_once(media: Media, count: int, options: Mapping[str, Any], path: str) -> Done:
            if not refused:
                refused.append(path)
                raise SharedMemoryFullError("no room")
            return await submit(media, count, options, path)

        front.pool.submit = full_once  # type: ignore[method-assign]
        await serve_in_turn(fleet, [2], [1])
        assert fleet.ended["served"] == 3
        assert front.pool.processed == [1, 2, 1], "the first picture was evicted"
        await fleet.close()

    asyncio.run(main())
