"""Results in the format of `vllm bench serve --save-result`, for scripts that read it."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.results import RequestRecord
from bench.results.writing import replace_file, writing


def vllm_result(
    requests: Sequence[RequestRecord],
    model: str,
    *,
    request_rate: float | None = None,
    max_concurrency: int | None = None,
) -> dict[str, Any]:
    """One load point in that format, with the details of each request; `request_rate` None is "inf".

    Texts are not kept, so generated_texts are empty. TTFT and latencies count from the intended send time, start_times
    from the start of the load point.
    """
    done = [r for r in requests if r.status == "ok" and r.ttft_s is not None and r.e2e_s is not None]
    start = min((r.intended_s for r in requests), default=0.0)
    end = max((r.intended_s + (r.e2e_s or 0.0) for r in done), default=start)
    duration = max(end - start, 1e-9)
    inputs, outputs = sum(r.input_tokens for r in done), sum(r.output_tokens for r in done)
    result: dict[str, Any] = {
        "date": f"{datetime.now():%Y%m%d-%H%M%S}",
        "endpoint_type": "openai",
        "backend": "openai",
        "label": None,
        "model_id": model,
        "tokenizer_id": model,
        "num_prompts": len(requests),
        "request_rate": "inf" if request_rate is None else request_rate,
        "burstiness": 1.0,
        "max_concurrency": max_concurrency,
        "duration": duration,
        "completed": len(done),
        "failed": len(requests) - len(done),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(done) / duration,
        "request_goodput": None,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "latencies": [r.e2e_s for r in done],
        "queue_times": [],
        "rtfx": 0.0,
    }
    return result | _peaks(done) | _statistics(done) | _details(requests)


def save_vllm_result(path: Path, result: dict[str, Any]) -> None:
    """Write the file; raises CannotWriteError naming --save-vllm-json."""
    text = json.dumps(result)
    with writing(path, "--save-vllm-json"):
        replace_file(path, lambda part: part.write_text(text))


def _statistics(done: Sequence[RequestRecord]) -> dict[str, float]:
    tpot = [r.decode_s / (r.output_tokens - 1) for r in done if r.output_tokens > 1]
    samples = {
        "ttft": [r.ttft_s or 0.0 for r in done],
        "tpot": tpot,
        "itl": [float(gap) for r in done for gap in r.chunk_gaps_s],
        "e2el": [r.e2e_s or 0.0 for r in done],
    }
    found: dict[str, float] = {}
    for name, seconds in samples.items():
        ms = np.asarray(seconds or [0.0]) * 1e3
        found |= {
            f"mean_{name}_ms": float(ms.mean()),
            f"median_{name}_ms": float(np.median(ms)),
            f"std_{name}_ms": float(ms.std()),
            f"p99_{name}_ms": float(np.percentile(ms, 99)),
        }
    return found


def _peaks(done: Sequence[RequestRecord]) -> dict[str, float]:
    """The highest number of tokens per second, counted from the first request, and of concurrent requests."""
    if not done:
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    starts = np.array([r.intended_s for r in done])
    ends = starts + np.array([r.e2e_s or 0.0 for r in done])
    # At equal times an end counts before a start: in a closed loop the one replaces the other.
    events = np.concatenate((starts, ends))
    steps = np.concatenate((np.ones(len(starts)), -np.ones(len(ends))))
    most = int(np.cumsum(steps[np.lexsort((steps, events))]).max())
    arrivals = [
        r.intended_s + (r.ttft_s or 0.0) + np.concatenate(([0.0], np.cumsum(r.chunk_gaps_s))) - starts.min()
        for r in done
    ]
    tokens = np.concatenate([r.chunk_tokens for r in done])
    a_second = np.bincount(np.concatenate(arrivals).astype(np.int64), weights=tokens)
    return {"max_output_tokens_per_s": float(a_second.max()), "max_concurrent_requests": most}


def _details(requests: Sequence[RequestRecord]) -> dict[str, list[Any]]:
    """Lists with one entry per request; a failed request has no output, as in vLLM."""
    ok = [r.status == "ok" for r in requests]
    return {
        "input_lens": [r.input_tokens for r in requests],
        "output_lens": [r.output_tokens if good else 0 for r, good in zip(requests, ok, strict=True)],
        "ttfts": [(r.ttft_s or 0.0) if good else 0.0 for r, good in zip(requests, ok, strict=True)],
        "itls": [list(map(float, r.chunk_gaps_s)) if good else [] for r, good in zip(requests, ok, strict=True)],
        "start_times": [r.intended_s for r in requests],
        "generated_texts": ["" for _ in requests],
        "errors": ["" if good else f"{r.status} {r.error}".strip() for r, good in zip(requests, ok, strict=True)],
    }
