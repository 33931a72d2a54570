"""Ranges of messages against a plain list of times by request."""

from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.columns import column
from engine.hardware.token_log import TokenLog

MESSAGES = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True).map(sorted), max_size=30)


@given(MESSAGES, st.integers(0, 4))
def test_times_are_those_of_the_messages_with_a_token(messages: list[list[int]], taken_first: int) -> None:
    log, times = TokenLog(), defaultdict[int, list[float]](list)
    for number, handles in enumerate(messages):
        joined = log.add(number / 8, column(handles, "<i8"))
        assert joined == set(handles) - set(messages[number - 1] if number else [])
        for handle in handles:
            times[handle].append(number / 8)
    for handle in range(5):
        assert log.count(handle) == len(times[handle])
    for handle in (taken_first, *(other for other in range(5) if other != taken_first)):
        (taken,) = log.take([handle])
        if taken is None:
            assert not times[handle]
            continue
        assert (taken.first_s, taken.last_s) == (times[handle][0], times[handle][-1])
        assert taken.gaps_s.tolist() == np.diff(times[handle]).tolist()


def test_a_taken_request_may_still_be_in_the_newest_message() -> None:
    log = TokenLog()
    log.add(1.0, column([1, 2], "<i8"))
    log.take([1])
    log.add(2.0, column([2, 3], "<i8"))
    (second,) = log.take([2])
    assert second is not None
    assert (second.first_s, second.last_s) == (1.0, 2.0)
    assert log.take([1]) == [None]
