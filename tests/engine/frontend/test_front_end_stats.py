"""The counters of several front ends, in one memory."""

import os

from engine.frontend.front_end_stats import MOST_REPLICAS, REASONS, TOKENS, Board, Boards, FrontEndStats
from engine.stats import MMStats, SpillStats, Stats


def test_a_histogram_counts_by_upper_bound():
    histogram = FrontEndStats().prompt_tokens
    for value in (1, 2, 3, 10**9):
        histogram.observe(value)
    assert histogram.total == 10**9 + 6
    cumulative = dict(histogram.cumulative())
    assert (cumulative["1.0"], cumulative["2.0"], cumulative["5.0"], cumulative["+Inf"]) == (1, 2, 3, 4)
    assert len(histogram.counts) == len(TOKENS) + 1


def test_the_core_s_stats_come_back_as_they_were():
    stats = FrontEndStats()
    given = Stats(running=3, waiting=2, kv_cache_usage=0.25, preemptions=1, prompt_tokens=2**40, last_step_at=12.5)
    stats.record_core(13.0, given)
    assert stats.core == given
    assert isinstance(stats.core.running, int)


def test_parts_of_the_stats_that_only_some_cores_have():
    for parts in (
        {},
        {"spill": SpillStats(8, 3, spilled=5)},
        {"mm": MMStats(4)},
        {"mm": MMStats(4), "spill": SpillStats(8)},
    ):
        stats = FrontEndStats()
        stats.record_core(13.0, Stats(running=1, **parts))
        assert stats.core == Stats(running=1, **parts)


def test_replicas_add_up_and_a_dead_one_has_no_blocks_left():
    replicas = [FrontEndStats(), FrontEndStats()]
    for replica in replicas:
        replica.record_core(1.0, Stats(spill=SpillStats(host_blocks=8, host_used=3, spilled=5, disk_used=2)))
    living = FrontEndStats.sum_replicas(replicas, [False, False]).core.spill
    assert living == SpillStats(host_blocks=16, host_used=6, spilled=10, disk_used=4)
    assert FrontEndStats.sum_replicas(replicas, [True, False]).core.spill == SpillStats(8, 3, 0, 2, spilled=10)


def test_a_step_s_tokens_are_what_the_counters_grew_by():
    stats = FrontEndStats()
    for tokens in (0, 100, 100, 103):
        stats.record_core(1.0, Stats(generation_tokens=tokens))
    assert (stats.step_tokens.total, sum(stats.step_tokens.counts)) == (103, 2)


def test_who_takes_over_a_front_end_s_counters_goes_on_from_them():
    boards = Boards(2)
    boards[0].stats[1].record_core(1.0, Stats(generation_tokens=1000))
    [_, successor] = Boards(2, os.dup(boards.descriptor))[0].stats
    successor.record_core(2.0, Stats(generation_tokens=1003))
    assert (successor.step_tokens.total, sum(successor.step_tokens.counts)) == (1003, 2), "steps of 1000 and 3 tokens"
    boards.close()


def test_front_ends_add_up_and_the_newest_word_of_the_core_holds():
    board = Board(3)
    for number, front_end in enumerate(board.stats):
        front_end.live = number
        for _ in range(number):
            front_end.count_finished("stop")
            front_end.ttft.observe(0.5)
    board.stats[1].record_core(5.0, Stats(running=7, generation_tokens=70))
    board.stats[2].record_core(4.0, Stats(running=9, generation_tokens=60))
    total = board.total()
    assert total.live == 3
    assert total.finished == {"stop": 3}
    assert (total.ttft.total, sum(total.ttft.counts)) == (1.5, 3)
    assert total.core.running == 7
    assert [front_end.finished["stop"] for front_end in board.stats] == [0, 1, 2], "the sums are a copy"


def test_steps_that_all_front_ends_hear_of_count_once():
    board = Board(2)
    for front_end in board.stats:
        front_end.record_core(1.0, Stats(generation_tokens=8))
    assert board.total().step_tokens.total == 8


def test_another_process_reads_and_writes_the_same_boards():
    ours = Boards(2)
    theirs = Boards(2, os.dup(ours.descriptor))
    last = MOST_REPLICAS - 1
    theirs[last].stats[1].count_finished("length")
    theirs[last].stats[1].record_core(2.0, Stats(waiting=4))
    assert ours[last].total().finished == {"length": 1}
    assert ours[last].total().core.waiting == 4
    assert ours[last].stats[0].finished == {}
    assert not any(ours[number].total().finished for number in range(last)), "each replica has its own"
    for boards in (ours, theirs):
        boards.close()


def test_counters_go_on_when_a_core_is_replaced():
    board = Board(2)
    for front_end, tokens in zip(board.stats, (100, 98), strict=True):  # one has missed the last message
        front_end.record_core(1.0, Stats(running=3, generation_tokens=tokens, steps=10, last_step_at=1.0))
    seen = [board.total().all_cores.generation_tokens]
    for front_end in reversed(board.stats):  # one after the other learns of the new core
        front_end.core_replaced()
        seen.append(board.total().all_cores.generation_tokens)
    board.stats[1].record_core(2.0, Stats(generation_tokens=5, steps=1, last_step_at=2.0))
    seen.append(board.total().all_cores.generation_tokens)
    assert seen == [100, 100, 100, 105]
    total = board.total()
    assert (total.core.generation_tokens, total.core.steps, total.core.running) == (5, 1, 0)
    summed = FrontEndStats.sum_replicas([total, total], [False, True])
    assert (summed.core.generation_tokens, summed.core.steps) == (210, 22), "a dead replica keeps its counters"


def test_every_reason_has_a_counter_of_its_own():
    stats = FrontEndStats()
    for reason in REASONS:
        stats.count_finished(reason)
    assert stats.finished == dict.fromkeys(REASONS, 1)
