import pytest

from bench.target.metrics import MetricsReader, ServerState, parse_metrics, window_state

NEW_VLLM = """\
# HELP vllm:num_requests_running Number of requests
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a b}c"} 3.0
vllm:num_requests_running{engine="1",model_name="a b}c"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 99.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:num_preemptions_total{engine="0"} 7.0
vllm:num_preemptions_created{engine="0"} 1.7e+09
vllm:prefix_cache_queries_total{engine="0"} 1000.0
vllm:prefix_cache_hits_total{engine="0"} 250.0
"""


def test_current_vllm_names_summed_over_engines() -> None:
    assert parse_metrics(NEW_VLLM, 5.0) == ServerState(
        at_s=5.0, running=7, waiting=2, kv_use=0.75, preemptions=7, prefix_queries=1000, prefix_hits=250
    )


def test_older_vllm_and_sglang_names() -> None:
    old = "vllm:num_preemptions 3\nvllm:gpu_cache_usage_perc 0.5 1700000000\nvllm:gpu_prefix_cache_queries 10\n"
    assert parse_metrics(old, 0) == ServerState(0, preemptions=3, kv_use=0.5, prefix_queries=10)
    sglang = (
        'sglang:num_running_reqs{model_name="m"} 5\nsglang:num_queue_reqs{} 6\nsglang:token_usage 0.28\n'
        "sglang:num_retracted_reqs 2\nsglang:prompt_tokens_total 8.1e+06\nsglang:cached_tokens_total 100\n"
    )
    assert parse_metrics(sglang, 0) == ServerState(
        0, running=5, waiting=6, kv_use=0.28, retracted_now=2, prefix_queries=8.1e6, prefix_hits=100
    )


def test_pages_of_other_programs_say_nothing() -> None:
    assert parse_metrics("<html>\nvllm:num_requests_running\nvllm:num_requests_waiting x\n", 1) == ServerState(1)


def test_counters_are_differences_around_the_window() -> None:
    states = [
        ServerState(float(t), running=t, waiting=0, preemptions=10 * t, prefix_queries=100 * t, prefix_hits=40 * t)
        for t in range(6)
    ]
    state = window_state(states, 1.4, 3.5)  # readings at 1 … 4
    assert state.preemptions == 30
    assert state.prefix_hit_rate == pytest.approx(0.4)
    assert (state.running_max, state.waiting_max) == (4, 0)
    assert window_state(states, 4.5, 99).preemptions == 10
    assert window_state([], 0, 1).preemptions is None


def test_a_gauge_of_retractions_stands_in_for_a_counter() -> None:
    states = [ServerState(0, retracted_now=0), ServerState(1, retracted_now=2), ServerState(2, retracted_now=0)]
    assert window_state(states, 0, 2).preemptions == 2
    assert window_state(states[:1], 0, 2).preemptions == 0


def test_slots_full_need_a_queue_and_a_standstill() -> None:
    def states(running: list[int], waiting: int) -> list[ServerState]:
        return [ServerState(float(i), running=r, waiting=waiting) for i, r in enumerate(running)]

    assert window_state(states([16, 16, 15, 16, 16, 16], 4), 0, 5).slots_full
    assert not window_state(states([16, 16, 15, 16, 16, 16], 0), 0, 5).slots_full
    assert not window_state(states([9, 12, 16, 11, 14, 10], 4), 0, 5).slots_full


def test_reads_a_server(queue_server) -> None:  # type: ignore[no-untyped-def]
    server = queue_server()
    with MetricsReader(server.base_url, every_s=0.05) as reader:
        assert reader.available
        assert reader.healthy()
        assert reader.latest is not None
        assert reader.latest.running == 0
        assert reader.latest.preemptions == 0
        server.stop()
        assert reader.read() is None
        assert reader.failures >= 1
        assert not reader.healthy()


def test_a_server_without_metrics(queue_server) -> None:  # type: ignore[no-untyped-def]
    with MetricsReader(queue_server("--no-metrics").base_url) as reader:
        assert not reader.available
        assert reader.latest is None
        assert reader.healthy()
