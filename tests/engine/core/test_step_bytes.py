"""The size of step messages while many slots decode: only slots that receive a block cost bytes."""

from concurrent.futures import Future
from typing import Any

from engine.messages import decode_step
from tests.engine.core_driver import Driver, resolved
from tests.engine.fake_executor import FakeExecutor

ROWS, BLOCK, NEW = 256, 16, 40
PLENTY = 1000  # bytes


class Weighing(FakeExecutor):
    """Also records the size of each message in which all slots decode."""

    def __init__(self, *given: Any):
        super().__init__(*given)
        self.sizes: list[int] = []

    def submit(self, step: bytes) -> Future[None]:
        message = decode_step(step)
        if not (message.assigned_slots or message.freed_slots or message.chunks) and len(self.slots) == ROWS:
            self.sizes.append(len(step))
        return super().submit(step)


def sizes(lengths: list[int]) -> list[int]:
    blocks = 1 + ROWS * (max(lengths) + NEW) // BLOCK + ROWS
    config = resolved(
        max_num_seqs=ROWS, max_num_batched_tokens=8192, block_size=BLOCK, num_blocks=blocks, max_model_len=128
    )
    driver = Driver(config, lambda *_: 0.05, Weighing)  # so long that steps are planned one by one
    for i, length in enumerate(lengths):
        driver.add([i % 50, *[7] * (length - 1)], NEW)
    driver.run()
    assert isinstance(driver.worker, Weighing)
    assert len(driver.worker.sizes) > NEW - 10
    return driver.worker.sizes


def test_a_step_of_256_decoding_rows_takes_less_than_a_kilobyte() -> None:
    """Requests that came at random stand at all places of their blocks: a sixteenth of them takes one in a step."""
    found = sizes([5 + i % BLOCK for i in range(ROWS)])
    print(f"{min(found)} to {max(found)} bytes")
    assert max(found) <= PLENTY


def test_rows_in_lockstep_take_all_their_blocks_in_one_step_of_sixteen() -> None:
    found = sizes([5] * ROWS)
    print(f"{min(found)} to {max(found)} bytes, {sum(found) / len(found):.0f} on average")
    assert max(found) <= PLENTY
    assert sorted(found)[len(found) * 3 // 4] <= 32
    assert min(found) <= 32
