import json
from pathlib import Path

import pytest

from bench.results import RequestRecord
from bench.results.vllm_json import save_vllm_result, vllm_result

KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "latencies", "queue_times",
    "max_output_tokens_per_s", "max_concurrent_requests", "rtfx", "input_lens", "output_lens", "ttfts", "itls",
    "start_times", "generated_texts", "errors",
}  # fmt: skip


def row(index: int, start: float, gaps: list[float], status: str = "ok") -> RequestRecord:
    ok = status == "ok"
    return RequestRecord(
        index, start, start, 0.1, 0.1 + sum(gaps) if ok else None, 5, 1 + len(gaps), 1 + len(gaps), 0, True, status,
        "" if ok else "why", gaps, [1] * (1 + len(gaps)),
    )  # fmt: skip


def test_schema_and_figures(tmp_path: Path) -> None:
    rows = [row(0, 1.0, [0.2, 0.2]), row(1, 1.5, [0.1, 0.5, 0.3]), row(2, 2.5, [], "http 429")]
    result = vllm_result(rows, "m", max_concurrency=2)
    assert result.keys() >= KEYS
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{kind}_{metric}_ms" for kind in ("mean", "median", "std", "p99")} <= result.keys()
    assert result["request_rate"] == "inf"
    assert (result["num_prompts"], result["completed"], result["failed"]) == (3, 2, 1)
    assert result["duration"] == pytest.approx(1.5)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (10, 7)
    assert result["output_throughput"] == pytest.approx(7 / 1.5)
    assert result["median_itl_ms"] == pytest.approx(200)
    assert result["mean_tpot_ms"] == pytest.approx(250)
    assert result["mean_e2el_ms"] == pytest.approx(750)
    assert result["max_concurrent_requests"] == 1
    assert result["max_output_tokens_per_s"] == 5  # the others come later than a second after the first
    assert result["itls"] == [[0.2, 0.2], [0.1, 0.5, 0.3], []]
    assert result["errors"] == ["", "", "http 429 why"]
    path = tmp_path / "new" / "file.json"
    save_vllm_result(path, result)
    assert json.loads(path.read_text())["completed"] == 2


def test_nothing_was_answered() -> None:
    result = vllm_result([row(0, 0.0, [], "connection")], "m", request_rate=2.0)
    assert (result["completed"], result["request_rate"], result["p99_ttft_ms"]) == (0, 2.0, 0.0)
