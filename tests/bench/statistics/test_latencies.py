import pytest

from bench.statistics.intervals import percentile
from bench.statistics.latencies import goodput, latencies, token_rates
from tests.bench.records import plain_request


def test_a_stall_is_seen_and_not_averaged_away() -> None:
    rows = [plain_request(chunk_gaps_s=[0.02] * 62 + [0.52], chunk_tokens=[1] * 64) for _ in range(20)]
    samples = latencies(rows, 10.0)
    assert percentile(samples.itl, 99) == pytest.approx(520)
    assert percentile(samples.tpot, 50) == pytest.approx((62 * 20 + 520) / 63)


def test_chunks_of_several_tokens_count_all_of_them() -> None:
    samples = latencies([plain_request(chunk_gaps_s=[0.08], chunk_tokens=[4, 4], output_tokens=8)], 10.0)
    assert samples.tokens_per_chunk == 4
    assert samples.tpot.tolist() == pytest.approx([20.0])
    assert samples.itl.tolist() == pytest.approx([80.0])


def test_open_requests_count_with_what_they_waited_and_failed_ones_not() -> None:
    rows = [
        plain_request(),
        plain_request(intended_s=2.0, status="cut short", ttft_s=None, e2e_s=None, chunk_gaps_s=[], chunk_tokens=[]),
        plain_request(status="http 429", ttft_s=None, e2e_s=None, chunk_gaps_s=[], chunk_tokens=[]),
        plain_request(in_window=False),
    ]
    samples = latencies(rows, 5.0)
    assert samples.ttft.tolist() == pytest.approx([100.0, 3000.0])
    assert samples.e2e.tolist() == pytest.approx([400.0, 3000.0])
    assert samples.cut_short == 1
    assert len(samples.itl) == 3
    assert samples.itl_steps.tolist() == [0, 1, 2]


def test_token_rates_count_arrivals_inside_the_window_only() -> None:
    rows = [plain_request(intended_s=0.0), plain_request(intended_s=0.75, in_window=False)]
    # Tokens at 0.1, 0.2, 0.3, 0.4 and 0.85, 0.95, 1.05, 1.15.
    assert token_rates(rows, 0.0, 1.0) == (14, 6)
    assert token_rates(rows, 0.25, 0.75) == (0, 4)


def test_goodput_counts_the_requests_that_met_every_limit() -> None:
    rows = [
        plain_request(),  # TTFT 100 ms, E2E 400 ms, gaps of 100 ms
        plain_request(ttft_s=0.3),
        plain_request(chunk_gaps_s=[0.01] * 9 + [0.5], chunk_tokens=[1] * 11),
        plain_request(chunk_gaps_s=[], chunk_tokens=[1]),  # no gaps, so none too long
        plain_request(status="http 500", ttft_s=None, e2e_s=None),
        plain_request(in_window=False),
    ]
    assert goodput(rows, {}, 2.0) is None
    assert goodput(rows, {"ttft_p99_ms": 200.0}, 2.0) == 1.5
    assert goodput(rows, {"ttft_p99_ms": 200.0, "itl_p99_ms": 150.0}, 2.0) == 1.0
    assert goodput(rows, {"itl_p50_ms": 50.0}, 2.0) == 1.0  # a stall doesn't move a median
    assert goodput(rows, {"tpot_p50_ms": 90.0}, 2.0) == 1.0
    assert goodput(rows, {"e2e_p99_ms": 300.0}, 2.0) == 0.0
