"""The index of host blocks beside a model of it: a list of keys, the least recently used first."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.core.host_tier import HostTier

KEYS = [bytes([i]) for i in range(8)]


def test_the_least_recently_used_block_is_reused() -> None:
    tier = HostTier(2)
    for key in (b"a", b"b"):
        block = tier.take()
        assert block is not None
        tier.enter(key, block)
        tier.unpin(block)
    assert tier.find(b"a") is not None
    block = tier.take()
    assert block is not None
    assert list(tier.block_of) == [b"a"]
    tier.unpin(block)
    tier.check()


def test_nothing_is_taken_while_all_are_pinned() -> None:
    tier = HostTier(1)
    block = tier.take()
    assert block == 0
    assert tier.take() is None
    tier.enter(b"a", block)
    assert tier.take() is None
    tier.drop(b"a")
    assert tier.take() is None, "it is still in use"
    tier.unpin(block)
    assert tier.take() == 0


def test_threads_only_get_blocks_whose_copies_have_been_made() -> None:
    tier = HostTier(1)
    block = tier.take()
    assert block is not None
    tier.enter(b"a", block)
    tier.mark_copied(block)
    tier.unpin(block)
    assert tier.take(settled=True) is None, "the step is being scheduled"
    tier.send_copies(7)
    tier.complete(6)
    assert tier.take(settled=True) is None, "it is in flight"
    assert tier.block_of == {b"a": block}
    tier.complete(7)
    assert tier.take(settled=True) == block


class HostTierMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 5))
    def start(self, num_blocks: int) -> None:
        self.tier = HostTier(num_blocks)
        self.num_blocks = num_blocks
        self.order: list[bytes] = []  # the least recently used first
        self.place: dict[bytes, int] = {}
        self.pins = [0] * num_blocks
        self.copied = [0] * num_blocks
        self.unsent: set[int] = set()
        self.step = self.completed = 0

    def _expected_victims(self, settled: bool) -> set[int]:
        """The blocks of which one must be taken; empty: none can be."""

        def usable(block: int) -> bool:
            done = block not in self.unsent and self.copied[block] <= self.completed
            return not self.pins[block] and (done or not settled)

        free = {one for one in range(self.num_blocks) if one not in self.place.values() and usable(one)}
        return free or {self.place[key] for key in [one for one in self.order if usable(self.place[one])][:1]}

    @rule(key=st.sampled_from(KEYS), settled=st.booleans(), keeps=st.booleans())
    def store(self, key: bytes, settled: bool, keeps: bool) -> None:
        if key in self.place:
            return
        expected = self._expected_victims(settled)
        block = self.tier.take(settled=settled)
        assert (block in expected) if expected else block is None
        if block is None:
            return
        for old in [one for one, place in self.place.items() if place == block]:
            self.order.remove(old)
            del self.place[old]
        self.tier.enter(key, block)
        self.order.append(key)
        self.place[key] = block
        self.pins[block] = 1
        if not keeps:
            self.tier.unpin(block)
            self.pins[block] = 0

    @rule(key=st.sampled_from(KEYS))
    def find(self, key: bytes) -> None:
        assert self.tier.find(key) == self.place.get(key)
        if key in self.place:
            self.order.remove(key)
            self.order.append(key)

    @rule(key=st.sampled_from(KEYS))
    def drop(self, key: bytes) -> None:
        self.tier.drop(key)
        if key in self.place:
            self.order.remove(key)
            del self.place[key]

    @rule()
    def reset(self) -> None:
        self.tier.reset()
        self.order, self.place = [], {}

    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        if self.place:
            block = self.place[data.draw(st.sampled_from(sorted(self.place)))]
            self.tier.pin(block)
            self.pins[block] += 1

    @precondition(lambda self: any(self.pins))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from([one for one in range(self.num_blocks) if self.pins[one]]))
        self.tier.unpin(block)
        self.pins[block] -= 1

    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        block = data.draw(st.integers(0, self.num_blocks - 1))
        self.tier.mark_copied(block)
        self.unsent.add(block)

    @rule()
    def send(self) -> None:
        self.step += 1
        self.tier.send_copies(self.step)
        for block in self.unsent:
            self.copied[block] = self.step
        self.unsent.clear()

    @precondition(lambda self: self.completed < self.step)
    @rule()
    def complete(self) -> None:
        self.completed += 1
        self.tier.complete(self.completed)

    @invariant()
    def same(self) -> None:
        if hasattr(self, "tier"):
            self.tier.check()
            assert list(self.tier.block_of) == self.order
            assert dict(self.tier.block_of) == self.place
            settled = [self.tier.is_settled(block) for block in range(self.num_blocks)]
            known = [one not in self.unsent and self.copied[one] <= self.completed for one in range(self.num_blocks)]
            assert settled == known


TestHostTierMachine = HostTierMachine.TestCase
TestHostTierMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_two_blocks_of_one_content_are_a_mistake() -> None:
    tier = HostTier(2)
    first, second = tier.take(), tier.take()
    assert first is not None
    assert second is not None
    tier.enter(b"a", first)
    with pytest.raises(AssertionError, match="two blocks of one content"):
        tier.enter(b"a", second)
