"""The pool of KV blocks."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.columns import column
from engine.core.block_pool import NULL_BLOCK, BlockPool
from engine.core.hashing import extend_hashes, root_hash


def names(tokens: list[int], size: int = 2, salt: str = "", adapter: str = "") -> list[bytes]:
    hashes: list[bytes] = []
    extend_hashes(hashes, root_hash(salt, adapter), column(tokens), size)
    return hashes


def test_blocks_without_content_are_reused_first_then_the_least_recently_freed():
    pool = BlockPool(7)
    old, new, bare = pool.allocate(2), pool.allocate(2), pool.allocate(2)
    for block, name in zip([*old, *new], (b"a", b"b", b"c", b"d"), strict=True):
        pool.cache([block], [name])
    pool.free(old)
    pool.free(new)
    pool.free(bare)
    assert pool.free_list() == [bare[0], bare[1], old[1], old[0], new[1], new[0]], "tails go before heads"
    pool.check()


def test_a_freed_block_is_found_until_it_is_reused():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.cache([blocks[0]], [b"a"])
    pool.cache([blocks[1]], [b"b"])
    pool.free(blocks)
    assert pool.get_cached([b"a", b"b", b"c"]) == blocks[:2]
    pool.allocate(2)  # the anonymous one, then the tail
    assert pool.get_cached([b"a", b"b"]) == blocks[:1]
    pool.touch(blocks[:1])
    assert pool.num_free == 0
    pool.check()


def test_the_same_content_is_named_once():
    pool = BlockPool(4)
    first, second = pool.allocate(2)
    pool.cache([first], [b"a"])
    pool.cache([second], [b"a"])
    assert pool.get_cached([b"a"]) == [first]
    pool.check()


def test_forgetting_keeps_held_blocks():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.cache([blocks[0]], [b"a"])
    pool.reset_cache()
    assert pool.get_cached([b"a"]) == []
    assert pool.usage == pytest.approx(2 / 3)
    pool.check()


def test_asking_for_more_than_is_free_is_a_bug_with_numbers():
    with pytest.raises(AssertionError, match="4 blocks were requested, 3 are free"):
        BlockPool(4).allocate(4)
    with pytest.raises(ValueError, match="null block"):
        BlockPool(0)
    assert BlockPool(1).usage == 0


class PoolMachine(RuleBasedStateMachine):
    """Any order of operations keeps the books balanced."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(9)
        self.tables: list[list[int]] = []
        self.count = 0

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def allocate(self, data: st.DataObject):
        blocks = self.pool.allocate(data.draw(st.integers(1, self.pool.num_free)))
        assert NULL_BLOCK not in blocks
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject):
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def publish(self, data: st.DataObject, name: bytes):
        self.pool.cache([data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))], [name])

    @rule(name=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def hold(self, name: bytes):
        found = self.pool.get_cached([name])
        if found:
            self.pool.touch(found)
            self.tables.append(found)

    @rule()
    def forget(self):
        self.pool.reset_cache()

    @invariant()
    def balanced(self):
        self.pool.check()
        held = [block for table in self.tables for block in table]
        assert [held.count(block) for block in range(9)] == self.pool.references


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(st.lists(st.integers(0, 9), max_size=20), st.lists(st.integers(0, 9), max_size=20))
def test_names_agree_exactly_as_far_as_the_tokens_do(left: list[int], right: list[int]):
    for index, (a, b) in enumerate(zip(names(left), names(right), strict=False)):
        assert (a == b) == (left[: 2 * index + 2] == right[: 2 * index + 2])


def test_names_extend_without_starting_over():
    hashes = names([1, 2, 3, 4, 5])
    assert len(hashes) == 2
    extend_hashes(hashes, b"not looked at any more", column([1, 2, 3, 4, 5, 6]), 2)
    assert hashes == names([1, 2, 3, 4, 5, 6])


def test_salt_and_adapter_are_framed():
    assert names([1, 2], salt="ab", adapter="c") != names([1, 2], salt="a", adapter="bc")
