"""Multimodal inputs in the scheduler: encoded once and whole, present when needed, freed when no longer needed."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.columns import column
from engine.core.hashing import extend_hashes, mm_block_keys, root_hash
from engine.core.mm_inputs import EncoderCache, EncoderCacheManager
from engine.core.request import Request
from engine.messages import AddRequest, MMInputRef, Sampling, make_handle

BUDGET = 16


def request(sequence: int, *mm_inputs: MMInputRef, prompt_len: int = 40) -> Request:
    message = AddRequest(make_handle(0, sequence), column(range(prompt_len)), 4, Sampling(), mm_inputs=mm_inputs)
    made = Request(message, 1000, 0.0)
    made.slot = sequence
    return made


def image(name: str, offset: int, length: int = 4, bidirectional: bool = False, joint: bool = False) -> MMInputRef:
    return MMInputRef(name.encode(), offset, length, bidirectional, joint=joint)


def joint_image(name: str, offset: int, length: int = 4) -> MMInputRef:
    return image(name, offset, length, bidirectional=True, joint=True)


def chunk(manager: EncoderCacheManager, one: Request, start: int, count: int) -> int:
    """What the scheduler does for one chunk."""
    count = manager.num_schedulable_tokens(one, start, count)
    if count:
        manager.schedule_inputs(one, start, count)
        manager.free_passed_inputs(one, start + count)
    return count


# -------------------------------------------------------------------------------------------------------- the cache


def test_what_nobody_holds_goes_oldest_first_and_only_when_room_is_needed():
    cache = EncoderCache(10)
    for name in (b"a", b"b"):
        assert cache.acquire(name, 4)
    cache.release(b"b")
    cache.release(b"a")
    assert cache.take_evicted() == ()
    assert not cache.acquire(b"b", 4), "it is still there"
    assert cache.acquire(b"c", 5)
    assert cache.take_evicted() == (b"a",)
    assert not cache.can_allocate(5), "b and c are held"
    cache.check()


def test_without_keeping_embeddings_go_with_their_last_reference():
    cache = EncoderCache(10, keep_unreferenced=False)
    assert cache.acquire(b"a", 4)
    assert not cache.acquire(b"a", 4)
    cache.release(b"a")
    assert cache.take_evicted() == ()
    cache.release(b"a")
    assert cache.take_evicted() == (b"a",)
    assert cache.num_used == 0


# --------------------------------------------------------------------------------------------------------- the hooks


def test_an_item_is_encoded_with_its_first_placeholder_and_held_until_its_last():
    manager, one = EncoderCacheManager(8, BUDGET), request(1, image("a", 3, 8))
    assert chunk(manager, one, 0, 3) == 3
    assert manager.take_step_changes() == ((), ())
    assert chunk(manager, one, 3, 5) == 5
    assert manager.take_step_changes() == (((1, 0),), ())
    assert manager.cache.references == {b"a": 1}
    assert chunk(manager, one, 8, 10) == 10
    assert manager.take_step_changes() == ((), ()), "it is encoded once"
    assert manager.cache.references == {}
    manager.check([one])


def test_a_chunk_ends_before_an_item_that_finds_no_room():
    manager = EncoderCacheManager(8, BUDGET)
    first, second = request(1, image("a", 0, 8)), request(2, image("b", 5, 4))
    assert chunk(manager, first, 0, 4) == 4
    assert chunk(manager, second, 0, 12) == 5
    assert manager.take_step_changes() == (((1, 0),), ())
    assert chunk(manager, second, 5, 12) == 0, "the first request still needs all the room"
    assert chunk(manager, first, 4, 8) == 8
    assert chunk(manager, second, 5, 12) == 0, "this step reads the first input to its end"
    assert manager.take_step_changes() == ((), ())
    assert chunk(manager, second, 5, 12) == 12
    assert manager.take_step_changes() == (((2, 0),), (b"a",))


def test_two_requests_with_the_same_image_encode_it_once():
    manager = EncoderCacheManager(8, BUDGET)
    first, second = request(1, image("a", 2)), request(2, image("a", 5))
    assert (chunk(manager, first, 0, 10), chunk(manager, second, 0, 10)) == (10, 10)
    assert manager.take_step_changes() == (((1, 0),), ())
    assert chunk(manager, request(3, image("a", 0)), 0, 10) == 10
    assert manager.take_step_changes() == ((), ()), "nor does a later one"


def test_without_the_encoder_cache_each_request_encodes_for_itself_and_leaves_nothing():
    manager = EncoderCacheManager(8, BUDGET, shared=False)
    first, second = request(1, image("a", 2)), request(2, image("a", 5))
    assert (chunk(manager, first, 0, 10), chunk(manager, second, 0, 10)) == (10, 10)
    encode, freed = manager.take_step_changes()
    assert (encode, freed) == (((1, 0), (2, 0)), ())
    assert manager.cache.num_used == 0
    assert set(manager.take_step_changes()[1]) == {
        manager.refs_for_workers(first)[0].hash,
        manager.refs_for_workers(second)[0].hash,
    }
    assert manager.refs_for_workers(first)[0].hash != manager.refs_for_workers(second)[0].hash


def test_the_same_image_twice_in_a_prompt_is_encoded_once():
    manager, one = EncoderCacheManager(8, BUDGET), request(1, image("a", 2), image("a", 10))
    assert chunk(manager, one, 0, 11) == 11
    assert manager.take_step_changes() == (((1, 0),), ())
    assert manager.cache.references == {b"a": 1}
    assert chunk(manager, one, 11, 8) == 8
    assert manager.take_step_changes() == ((), ())
    assert manager.cache.references == {}


def test_a_bidirectional_item_is_not_split():
    manager, one = EncoderCacheManager(16, BUDGET), request(1, image("a", 3, 8, bidirectional=True))
    assert manager.num_schedulable_tokens(one, 0, 10) == 3
    assert manager.num_schedulable_tokens(one, 3, 7) == 0
    assert manager.num_schedulable_tokens(one, 3, 8) == 8
    assert manager.num_schedulable_tokens(one, 5, 5) == 0, "its beginning is cached: the rest is one piece"
    assert manager.num_schedulable_tokens(one, 5, 6) == 6


def test_joint_inputs_and_the_text_between_them_are_not_split():
    manager, one = EncoderCacheManager(16, BUDGET), request(1, joint_image("a", 3), joint_image("b", 10))
    assert manager.num_schedulable_tokens(one, 0, 2) == 2
    assert [manager.num_schedulable_tokens(one, 0, count) for count in (5, 9, 12, 13)] == [3, 3, 3, 3]
    assert manager.num_schedulable_tokens(one, 0, 14) == 14
    assert manager.num_schedulable_tokens(one, 3, 10) == 0
    assert manager.num_schedulable_tokens(one, 8, 2) == 0, "a prefix hit ends between them: the rest is one piece"
    assert manager.num_schedulable_tokens(one, 8, 6) == 6
    assert manager.num_schedulable_tokens(one, 14, 5) == 5


def test_joint_inputs_wait_until_all_of_them_fit():
    manager, one = EncoderCacheManager(8, BUDGET), request(1, joint_image("a", 3), joint_image("b", 10))
    assert chunk(manager, request(2, image("c", 0, 4)), 0, 3) == 3
    assert chunk(manager, one, 0, 20) == 3, "only one of them would fit"
    manager.free_request(request(2))
    manager.take_step_changes()


def test_an_item_that_the_prefix_cache_covers_is_never_encoded():
    manager, one = EncoderCacheManager(8, BUDGET), request(1, image("a", 3, 4), image("b", 10, 4))
    assert chunk(manager, one, 8, 20) == 20
    assert manager.take_step_changes() == (((1, 1),), ())


def test_a_preempted_request_gives_its_items_back():
    manager, one = EncoderCacheManager(8, BUDGET), request(1, image("a", 0, 8))
    assert chunk(manager, one, 0, 4) == 4
    manager.take_step_changes()
    manager.free_request(one)
    manager.check([])
    assert chunk(manager, request(2, image("b", 0, 8)), 0, 8) == 8, "the room can be had"
    assert manager.take_step_changes() == (((2, 0),), (b"a",))


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ([image("a", 0, 9)], {}, "multimodal input 0 has 9 embeddings, the encoder cache has room for 8"),
        (
            [image("a", 0, 7, True)],
            {"budget": 6},
            "multimodal input 0 spans 7 tokens that must be computed in one step",
        ),
        ([joint_image("a", 0, 4), joint_image("b", 9, 4)], {"budget": 12}, "the 2 multimodal inputs span 13 tokens"),
        ([joint_image("a", 0, 5), joint_image("b", 9, 5)], {}, "the 2 multimodal inputs have 10 embeddings"),
        ([image("a", 38, 4)], {}, "inputs must follow each other within the prompt of 40 tokens"),
        ([image("a", 2, 4), image("b", 4, 4)], {}, "multimodal input 1 claims tokens 4 to 7"),
        ([image("a", 2, 0)], {}, "multimodal input 0 claims"),
        ([image("a", 0, 5), image("b", 5, 5)], {"whole_prompts": True}, "the multimodal inputs have 10 embeddings"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(images, options, said):
    manager = EncoderCacheManager(8, options.pop("budget", BUDGET), **options)
    refusal = manager.placeholder_error(request(1, *images))
    assert refusal is not None
    assert said in refusal


def test_what_can_be_served_is_not_refused():
    assert EncoderCacheManager(8, BUDGET).placeholder_error(request(1, image("a", 0, 8), image("b", 8, 8))) is None
    whole = EncoderCacheManager(8, BUDGET, whole_prompts=True)
    assert whole.placeholder_error(request(1, image("a", 0, 8), image("a", 8, 8))) is None, "one image, shown twice"


# --------------------------------------------------------------------------------------------------- names of blocks


def hashes(*mm_inputs: MMInputRef) -> list[bytes]:
    found: list[bytes] = []
    tokens = column([7] * 16)
    extend_hashes(found, root_hash(), tokens, 4, mm_block_keys(mm_inputs, 4, tokens))
    return found


def test_the_first_of_joint_images_is_shared_only_with_all_of_them_and_the_text_between():
    first, second = joint_image("a", 5, 2), joint_image("b", 12, 2)
    both = hashes(first, second)
    assert both[0] == hashes()[0] == hashes(first)[0], "before the image all is the same"
    assert hashes(image("a", 5, 2))[1] == hashes(first)[1], "one image is like any other"
    others = [
        (first,),
        (first, joint_image("c", 12, 2)),
        (first, joint_image("b", 13, 2)),
        (first, second, joint_image("b", 14, 2)),
    ]
    assert all(hashes(*other)[1] != both[1] for other in others)
    tokens = column([7] * 10 + [8] + [7] * 5)
    assert mm_block_keys((first, second), 4, tokens)[1] != mm_block_keys((first, second), 4, column([7] * 16))[1]
    later = column([7] * 15 + [8])
    assert mm_block_keys((first, second), 4, later) == mm_block_keys((first, second), 4, column([7] * 16))


def test_blocks_are_shared_only_under_the_same_image_at_the_same_place():
    plain, with_image = hashes(), hashes(image("a", 5, 6))
    assert plain[0] == with_image[0], "before the image all is the same"
    assert plain[1] != with_image[1]
    assert with_image == hashes(image("a", 5, 6))
    for other in (hashes(image("b", 5, 6)), hashes(image("a", 6, 6)), hashes(image("a", 5, 2), image("a", 7, 4))):
        assert other[1] != with_image[1]
    assert hashes(image("a", 4, 8))[2] != hashes(image("a", 8, 4))[2], "another part of the image"


# -------------------------------------------------------------------------------------------------- all interleavings


@dataclass
class Device:
    """A worker's embeddings, and what it would get wrong."""

    capacity: int
    has: dict[bytes, int] = field(default_factory=dict)

    def apply(self, free: tuple[bytes, ...], encode: list[MMInputRef]) -> None:
        for key in free:
            del self.has[key]  # frees only what it has
        for mm_input in encode:
            assert mm_input.hash not in self.has, "encoded although it is there"
            self.has[mm_input.hash] = mm_input.length
        assert sum(self.has.values()) <= self.capacity

    def compute(self, mm_inputs: tuple[MMInputRef, ...], start: int, end: int) -> None:
        for mm_input in mm_inputs:
            last = mm_input.offset + mm_input.length
            if mm_input.offset < end and last > start:
                assert self.has.get(mm_input.hash) == mm_input.length, "needed, but not there"
                assert last <= end or not mm_input.bidirectional, "split"


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[MMInputRef]]:
    """Inputs with gaps between them, with or without text at the end; a name always has the same length."""
    at, mm_inputs = 0, []
    for number in draw(st.lists(st.integers(0, 4), max_size=4)):
        at += draw(st.integers(0, 5))
        length = 1 + 2 * number % 7
        mm_inputs.append(image("abcde"[number], at, length, bidirectional=number == 3))
        at += length
    return max(at + draw(st.integers(0, 4)), 1), mm_inputs


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shared=st.booleans(), capacity=st.integers(7, 16), budget=st.integers(7, 12))
def test_no_order_of_events_finds_an_item_missing_or_left_over(data, shared, capacity, budget):
    manager, device = EncoderCacheManager(capacity, budget, shared=shared), Device(capacity)
    given_prompts = data.draw(st.lists(prompts(), min_size=1, max_size=5))
    waiting = [request(n, *images, prompt_len=length) for n, (length, images) in enumerate(given_prompts)]
    running: dict[int, int] = {}  # which request, how far it is
    everyone, idle_steps = list(waiting), 0
    encoded: set[tuple[int, int]] = set()  # by whom, of those that run
    while waiting or running:
        for sequence in list(running):
            if data.draw(st.integers(0, 5)) == 5:  # aborted, or preempted and begun anew
                manager.free_request(everyone[sequence])
                encoded = {one for one in encoded if one[0] != sequence}
                del running[sequence]
                if data.draw(st.booleans()):
                    waiting.append(everyone[sequence])
        if waiting and not data.draw(st.booleans()):
            one = waiting.pop(0)
            assert manager.placeholder_error(one) is None
            running[one.slot] = data.draw(st.integers(0, one.num_prompt_tokens - 1))  # the prefix cache's share
        left, chunks = budget, []
        for sequence, start in running.items():
            one = everyone[sequence]
            # A budget that others use up too; now and then all of it is there, so that spans find room.
            most = min(left, one.num_prompt_tokens - start, budget if not chunks else data.draw(st.integers(0, budget)))
            count = chunk(manager, one, start, most)
            assert 0 <= count <= most
            if count:
                chunks.append((sequence, start, count))
                left -= count
        encode, free = manager.take_step_changes()
        assert not encoded & set(encode), "encoded twice for the same run of a request"
        encoded |= set(encode)
        device.apply(free, [manager.refs_for_workers(everyone[slot])[index] for slot, index in encode])
        for sequence, start, count in chunks:
            device.compute(manager.refs_for_workers(everyone[sequence]), start, start + count)
            running[sequence] = start + count
            if running[sequence] == everyone[sequence].num_prompt_tokens:
                manager.free_request(everyone[sequence])
                del running[sequence]
        manager.check([everyone[sequence] for sequence in running])
        idle_steps = 0 if chunks else idle_steps + 1
        assert idle_steps < 100 or not running, "nobody gets on"
    assert not manager.cache.references, "all is over, but something is held"
    device.apply(manager.take_step_changes()[1], [])
    assert device.has == manager.cache.size_of
    assert shared or not device.has, "without the cache nothing stays"
