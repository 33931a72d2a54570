"""Conversations: the next turn carries the whole history."""

from hypothesis import given
from hypothesis import strategies as st

from bench.workloads import make_workload


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_turns_begin_with_what_was_sent_before(turns: int, conversations: int, count: int, seed: int) -> None:
    spec = {"kind": "multi-turn", "input": [3, 6], "output": [2, 4], "turns": turns, "conversations": conversations}
    workload = make_workload(spec, 5000)
    specs = workload.requests(count, seed)
    assert len(specs) == count
    assert workload.requests(count + 7, seed)[:count] == specs
    assert make_workload(workload.describe(), 5000).requests(count, seed) == specs
    prompts = [s.prompt_ids or [] for s in specs]
    for i, spec in enumerate(specs):
        assert spec.input_tokens == len(prompts[i])
        assert spec.input_tokens + spec.output_tokens <= workload.max_tokens
        earlier = [p for p in prompts[:i] if prompts[i][: len(p)] == p]
        assert len(earlier) < turns
        for before in earlier:
            assert len(prompts[i]) >= len(before) + 2 + 3  # its reply and a new question
    # Once every conversation that was under way at the start has ended, all turns of a conversation are seen.
    whole = workload.requests(3 * turns * conversations, seed)
    last = [
        p
        for p in (s.prompt_ids or [] for s in whole)
        if sum(p[: len(q.prompt_ids or [])] == q.prompt_ids for q in whole) == turns
    ]
    assert len(last) >= conversations


def test_conversations_of_one_seed_do_not_meet_those_of_another() -> None:
    workload = make_workload({"kind": "multi-turn", "input": 8, "output": 4, "turns": 3}, 40_000)
    first, second = ({tuple((s.prompt_ids or [])[:8]) for s in workload.requests(40, seed)} for seed in (1, 2))
    assert not first & second
    assert workload.name == "multi-turn 3x8/4"
    assert workload.max_tokens == 36
