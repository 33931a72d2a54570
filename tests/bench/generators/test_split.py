from hypothesis import given
from hypothesis import strategies as st

from bench.generators.split import divide


@given(count=st.integers(0, 500), parts=st.integers(1, 9), seed=st.integers(-(2**40), 2**40))
def test_each_request_has_one_generator_and_all_send_alike(count: int, parts: int, seed: int) -> None:
    divided = divide(count, parts, seed)
    assert len(divided) == parts
    assert sorted(index for part in divided for index in part) == list(range(count))
    assert all(part == sorted(part) for part in divided)
    for start in range(0, count - parts + 1, parts):  # of as many consecutive requests each part has one
        assert all(sum(start <= index < start + parts for index in part) == 1 for part in divided)
    assert divide(count, parts, seed) == divided


def test_the_seed_decides() -> None:
    assert divide(100, 3, 1) != divide(100, 3, 2)
    assert divide(5, 1, 7) == [[0, 1, 2, 3, 4]]
