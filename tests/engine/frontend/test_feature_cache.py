"""Feature caches of front ends and their mirrors in the cores, under any interleaving."""

import asyncio
import os

import pytest

from engine.multimodal.feature_files import PREFIX, find_parent
from tests.engine.frontend.input_fleet import InputFleet

TINY = 8000  # bytes: two to eight inputs


def folders() -> set[str]:
    return {name for name in os.listdir(find_parent()) if name.startswith(PREFIX)}


async def interleave(seed: int, front_ends: int, replicas: int, capacity: int) -> InputFleet:
    """Some requests with pictures of a small set, in an order that the seed draws."""
    fleet = InputFleet(seed, front_ends, replicas, capacity, failures=0.1 if seed % 3 == 0 else 0.0)
    luck = fleet.luck
    for _ in range(luck.randint(4, 8)):
        pictures = [luck.randrange(6) for _ in range(luck.randint(1, 3))]
        aborts = luck.randint(0, 60) if luck.random() < 0.3 else None
        fleet.start(luck.randrange(front_ends), pictures, aborts, max_tokens=luck.randint(1, 4))
        for _ in range(luck.randint(0, 12)):
            await fleet.act()
        fleet.check()
        if replicas > 1 and luck.random() < 0.03 and len(fleet.living) > 1:
            fleet.kill_core(luck.choice([*fleet.living]))
        if front_ends > 1 and luck.random() < 0.05:
            await fleet.kill_front_end(luck.randrange(front_ends))
    await fleet.finish()
    fleet.check()
    await fleet.close()
    return fleet


@pytest.mark.parametrize(("front_ends", "replicas", "capacity"), [(1, 1, TINY), (2, 2, TINY), (2, 2, 0)])
def test_no_mirror_drifts_under_any_interleaving(front_ends: int, replicas: int, capacity: int) -> None:
    before, served = folders(), 0
    count = {(1, TINY): 150, (2, TINY): 600, (2, 0): 250}[front_ends, capacity]
    for seed in range(count):
        fleet = asyncio.run(interleave(seed, front_ends, replicas, capacity))
        served += fleet.ended["served"]
        assert fleet.misses == 0
    assert served > 2 * count
    assert folders() == before, "something is left in shared memory"
