"""Random interleavings of requests with pictures, of which tests run some and `make faults` runs 1,000."""

import asyncio
import os

from tests.engine.frontend.input_fleet import InputFleet

TINY = 8000  # bytes: two to eight inputs
# (front ends, replicas, bytes of a cache): seeds
INTERLEAVINGS = {(1, 1, TINY): 250, (2, 2, TINY): 600, (2, 2, 0): 150}


def run_interleaving(seed: int, front_ends: int, replicas: int, capacity: int) -> int:
    """Serve some requests with pictures of a small set, in an order that the seed draws.

    With some seeds, processes of the pool die, or inputs can't be encoded.

    Returns:
        How many of them were served to their end.

    Raises:
        AssertionError: a mirror missed an input or drifted, an answer was wrong, or something is left in shared memory.
    """
    fleet = asyncio.run(_interleave(seed, front_ends, replicas, capacity))
    assert fleet.misses == 0
    assert not [path for path in fleet.all_folders if os.path.exists(path)], "left in shared memory"
    return fleet.ended["served"]


async def _interleave(seed: int, front_ends: int, replicas: int, capacity: int) -> InputFleet:
    fleet = InputFleet(seed, front_ends, replicas, capacity, failures=0.1 if seed % 3 == 0 else 0.0)
    luck = fleet.luck
    if seed % 3 == 1:
        for worker in fleet.workers:
            worker.fails = lambda: luck.random() < 0.15
    for _ in range(luck.randint(3, 6)):
        pictures = [luck.randrange(6) for _ in range(luck.randint(1, 3))]
        aborts = luck.randint(0, 60) if luck.random() < 0.3 else None
        fleet.start(luck.randrange(front_ends), pictures, aborts, max_tokens=luck.randint(1, 4))
        for _ in range(luck.randint(0, 9)):
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
