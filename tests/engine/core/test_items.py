"""Items in the scheduler: encoded once and whole, there when needed, gone when nobody needs them."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.hashing import extend_hashes, item_keys, root_hash
from engine.core.items import EncoderCache, Items
from engine.core.request import Request
from engine.messages import AddRequest, ItemRef, Sampling, column, make_handle

BUDGET = 16


def request(sequence: int, *items: ItemRef, prompt_len: int = 40) -> Request:
    message = AddRequest(make_handle(0, sequence), column(range(prompt_len)), 4, Sampling(), items=items)
    made = Request(message, 1000, 0.0)
    made.row = sequence
    return made


def image(name: str, offset: int, length: int = 4, bidirectional: bool = False) -> ItemRef:
    return ItemRef(name.encode(), offset, length, bidirectional)


def chunk(items: Items, one: Request, start: int, count: int) -> int:
    """What the scheduler does for one chunk."""
    count = items.clip(one, start, count)
    if count:
        items.reserve(one, start, count)
        items.computed(one, start + count)
    return count


# -------------------------------------------------------------------------------------------------------- the cache


def test_what_nobody_holds_goes_oldest_first_and_only_when_room_is_needed():
    cache = EncoderCache(10)
    for name in (b"a", b"b"):
        assert cache.hold(name, 4)
    cache.drop(b"b")
    cache.drop(b"a")
    assert cache.take_evicted() == ()
    assert not cache.hold(b"b", 4), "it is still there"
    assert cache.hold(b"c", 5)
    assert cache.take_evicted() == (b"a",)
    assert not cache.fits(5), "b and c are held"
    cache.check()


def test_without_keeping_embeddings_go_with_their_last_reference():
    cache = EncoderCache(10, keep=False)
    assert cache.hold(b"a", 4)
    assert not cache.hold(b"a", 4)
    cache.drop(b"a")
    assert cache.take_evicted() == ()
    cache.drop(b"a")
    assert cache.take_evicted() == (b"a",)
    assert cache.used == 0


# --------------------------------------------------------------------------------------------------------- the hooks


def test_an_item_is_encoded_with_its_first_placeholder_and_held_until_its_last():
    items, one = Items(8, BUDGET), request(1, image("a", 3, 8))
    assert chunk(items, one, 0, 3) == 3
    assert items.take_changes() == ((), ())
    assert chunk(items, one, 3, 5) == 5
    assert items.take_changes() == (((1, 0),), ())
    assert items.cache.references == {b"a": 1}
    assert chunk(items, one, 8, 10) == 10
    assert items.take_changes() == ((), ()), "it is encoded once"
    assert items.cache.references == {}
    items.check([one])


def test_a_chunk_ends_before_an_item_that_finds_no_room():
    items = Items(8, BUDGET)
    first, second = request(1, image("a", 0, 8)), request(2, image("b", 5, 4))
    assert chunk(items, first, 0, 4) == 4
    assert chunk(items, second, 0, 12) == 5
    assert items.take_changes() == (((1, 0),), ())
    assert chunk(items, second, 5, 12) == 0, "the first request still needs all the room"
    assert chunk(items, first, 4, 8) == 8
    assert chunk(items, second, 5, 12) == 0, "this step reads the first item to its end"
    assert items.take_changes() == ((), ())
    assert chunk(items, second, 5, 12) == 12
    assert items.take_changes() == (((2, 0),), (b"a",))


def test_two_requests_with_the_same_image_encode_it_once():
    items = Items(8, BUDGET)
    first, second = request(1, image("a", 2)), request(2, image("a", 5))
    assert (chunk(items, first, 0, 10), chunk(items, second, 0, 10)) == (10, 10)
    assert items.take_changes() == (((1, 0),), ())
    assert chunk(items, request(3, image("a", 0)), 0, 10) == 10
    assert items.take_changes() == ((), ()), "nor does a later one"


def test_without_the_encoder_cache_each_request_encodes_for_itself_and_leaves_nothing():
    items = Items(8, BUDGET, shared=False)
    first, second = request(1, image("a", 2)), request(2, image("a", 5))
    assert (chunk(items, first, 0, 10), chunk(items, second, 0, 10)) == (10, 10)
    encode, freed = items.take_changes()
    assert (encode, freed) == (((1, 0), (2, 0)), ())
    assert items.cache.used == 0
    assert set(items.take_changes()[1]) == {items.named(first)[0].hash, items.named(second)[0].hash}
    assert items.named(first)[0].hash != items.named(second)[0].hash


def test_the_same_image_twice_in_a_prompt_is_encoded_once():
    items, one = Items(8, BUDGET), request(1, image("a", 2), image("a", 10))
    assert chunk(items, one, 0, 11) == 11
    assert items.take_changes() == (((1, 0),), ())
    assert items.cache.references == {b"a": 1}
    assert chunk(items, one, 11, 8) == 8
    assert items.take_changes() == ((), ())
    assert items.cache.references == {}


def test_a_bidirectional_item_is_not_split():
    items, one = Items(16, BUDGET), request(1, image("a", 3, 8, bidirectional=True))
    assert items.clip(one, 0, 10) == 3
    assert items.clip(one, 3, 7) == 0
    assert items.clip(one, 3, 8) == 8
    assert items.clip(one, 5, 5) == 0, "the prefix cache gave its beginning: the rest is still one piece"
    assert items.clip(one, 5, 6) == 6


def test_an_item_that_the_prefix_cache_covers_is_never_encoded():
    items, one = Items(8, BUDGET), request(1, image("a", 3, 4), image("b", 10, 4))
    assert chunk(items, one, 8, 20) == 20
    assert items.take_changes() == (((1, 1),), ())


def test_a_preempted_request_gives_its_items_back():
    items, one = Items(8, BUDGET), request(1, image("a", 0, 8))
    assert chunk(items, one, 0, 4) == 4
    items.take_changes()
    items.release(one)
    items.check([])
    assert chunk(items, request(2, image("b", 0, 8)), 0, 8) == 8, "the room can be had"
    assert items.take_changes() == (((2, 0),), (b"a",))


@pytest.mark.parametrize(
    ("images", "options", "said"),
    [
        ([image("a", 0, 9)], {}, "item 0 has 9 embeddings, the encoder cache has room for 8"),
        ([image("a", 0, 7, True)], {"budget": 6}, "item 0 spans 7 tokens that must be computed in one step"),
        ([image("a", 38, 4)], {}, "items must follow each other within the prompt of 40 tokens"),
        ([image("a", 2, 4), image("b", 4, 4)], {}, "item 1 claims tokens 4 to 7"),
        ([image("a", 2, 0)], {}, "item 0 claims"),
        ([image("a", 0, 5), image("b", 5, 5)], {"whole_prompts": True}, "the items have 10 embeddings"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(images, options, said):
    items = Items(8, options.pop("budget", BUDGET), **options)
    refusal = items.refusal(request(1, *images))
    assert refusal is not None
    assert said in refusal


def test_what_can_be_served_is_not_refused():
    assert Items(8, BUDGET).refusal(request(1, image("a", 0, 8), image("b", 8, 8))) is None
    whole = Items(8, BUDGET, whole_prompts=True)
    assert whole.refusal(request(1, image("a", 0, 8), image("a", 8, 8))) is None, "one image, shown twice"


# --------------------------------------------------------------------------------------------------- names of blocks


def hashes(*items: ItemRef) -> list[bytes]:
    found: list[bytes] = []
    extend_hashes(found, root_hash(), column([7] * 16), 4, item_keys(items, 4))
    return found


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

    def apply(self, free: tuple[bytes, ...], encode: list[ItemRef]) -> None:
        for key in free:
            del self.has[key]  # frees only what it has
        for item in encode:
            assert item.hash not in self.has, "encoded although it is there"
            self.has[item.hash] = item.length
        assert sum(self.has.values()) <= self.capacity

    def compute(self, items: tuple[ItemRef, ...], start: int, end: int) -> None:
        for item in items:
            last = item.offset + item.length
            if item.offset < end and last > start:
                assert self.has.get(item.hash) == item.length, "needed, but not there"
                assert last <= end or not item.bidirectional, "split"


@st.composite
def prompts(draw: st.DrawFn) -> tuple[int, list[ItemRef]]:
    """Items with gaps between them and text at the end or not; a name always has the same length."""
    at, items = 0, []
    for number in draw(st.lists(st.integers(0, 4), max_size=4)):
        at += draw(st.integers(0, 5))
        length = 1 + 2 * number % 7
        items.append(image("abcde"[number], at, length, bidirectional=number == 3))
        at += length
    return max(at + draw(st.integers(0, 4)), 1), items


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shared=st.booleans(), capacity=st.integers(7, 16), budget=st.integers(7, 12))
def test_no_order_of_events_finds_an_item_missing_or_left_over(data, shared, capacity, budget):
    items, device = Items(capacity, budget, shared=shared), Device(capacity)
    given_prompts = data.draw(st.lists(prompts(), min_size=1, max_size=5))
    waiting = [request(n, *images, prompt_len=length) for n, (length, images) in enumerate(given_prompts)]
    running: dict[int, int] = {}  # which request, how far it is
    everyone, idle_steps = list(waiting), 0
    encoded: set[tuple[int, int]] = set()  # by whom, of those that run
    while waiting or running:
        for sequence in list(running):
            if data.draw(st.integers(0, 5)) == 5:  # aborted, or preempted and begun anew
                items.release(everyone[sequence])
                encoded = {one for one in encoded if one[0] != sequence}
                del running[sequence]
                if data.draw(st.booleans()):
                    waiting.append(everyone[sequence])
        if waiting and not data.draw(st.booleans()):
            one = waiting.pop(0)
            assert items.refusal(one) is None
            running[one.row] = data.draw(st.integers(0, one.prompt_len - 1))  # the prefix cache's share
        left, chunks = budget, []
        for sequence, start in running.items():
            one = everyone[sequence]
            # A budget that others use up too; now and then all of it is there, so that spans find room.
            most = min(left, one.prompt_len - start, budget if not chunks else data.draw(st.integers(0, budget)))
            count = chunk(items, one, start, most)
            assert 0 <= count <= most
            if count:
                chunks.append((sequence, start, count))
                left -= count
        encode, free = items.take_changes()
        assert not encoded & set(encode), "encoded twice for the same run of a request"
        encoded |= set(encode)
        device.apply(free, [items.named(everyone[row])[index] for row, index in encode])
        for sequence, start, count in chunks:
            device.compute(items.named(everyone[sequence]), start, start + count)
            running[sequence] = start + count
            if running[sequence] == everyone[sequence].prompt_len:
                items.release(everyone[sequence])
                del running[sequence]
        items.check([everyone[sequence] for sequence in running])
        idle_steps = 0 if chunks else idle_steps + 1
        assert idle_steps < 100 or not running, "nobody gets on"
    assert not items.cache.references, "all is over, but something is held"
    device.apply(items.take_changes()[1], [])
    assert device.has == items.cache.size_of
    assert shared or not device.has, "without the cache nothing stays"
