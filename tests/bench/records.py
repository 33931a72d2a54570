"""Rows with plain values, for tests that care about a few fields only."""

from bench.results import PointRecord, RequestRecord


def plain_point(**fields: object) -> PointRecord:
    plain: dict[str, object] = {
        "point_id": "p", "configuration": "c", "workload": "20/5", "phase": "search", "rate": 1.0,
        "sustained": True, "reason": "", "valid": True, "provisional": False, "preemptions": 0,
        "requests": 100, "completed": 100, "failed": 0, "window_s": 100.0, "achieved_rate": 1.0,
        "input_tok_s": 20.0, "output_tok_s": 5.0, "prefix_hit_rate": None, "kv_use_max": None,
        "waiting_max": None, "running_max": None, "lateness_p99_ms": 0.1, "ttft_p50_ms": 10.0,
        "ttft_p99_ms": 20.0, "itl_p50_ms": 5.0, "itl_p99_ms": 6.0, "tpot_p50_ms": 5.0, "tpot_p99_ms": 6.0,
        "e2e_p50_ms": 100.0, "e2e_p99_ms": 120.0, "itl_p99_low_ms": 5.5, "itl_p99_high_ms": 6.5,
        "ttft_p99_low_ms": 15.0, "ttft_p99_high_ms": 25.0, "seed": 0, "started": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return PointRecord(**(plain | fields))  # type: ignore[arg-type]


def plain_request(**fields: object) -> RequestRecord:
    plain: dict[str, object] = {
        "index": 0, "intended_s": 0.0, "sent_s": 0.0, "ttft_s": 0.1, "e2e_s": 0.4, "input_tokens": 7,
        "asked_output_tokens": 4, "output_tokens": 4, "cached_tokens": 0, "in_window": True, "status": "ok",
        "chunk_gaps_s": [0.1, 0.1, 0.1], "chunk_tokens": [1, 1, 1, 1],
    }  # fmt: skip
    return RequestRecord(**(plain | fields))  # type: ignore[arg-type]
