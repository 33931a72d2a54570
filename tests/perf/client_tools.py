"""The load generators that bench_client.py runs: how each is called, and where it puts what it found.

Other tools are measured where an interpreter that has them is named: VLLM_PYTHON, GUIDELLM_PYTHON, AIPERF_PYTHON.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

INPUT, OUTPUT = 16, 64


@dataclass(slots=True)
class Reported:
    """What a tool said; ms."""

    ttft_p50: float
    ttft_p99: float
    itl_p99: float
    cpu_us_per_chunk: float | None = None  # None: to be taken from the system's accounts
    note: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a tool."""

    url: str
    streams: int
    requests: int
    folder: Path
    input: int = INPUT  # tokens of a prompt
    shared_core: bool = False  # another process computes on the client's core all the time


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    command: Callable[[Run], list[str]]
    read: Callable[[Run], Reported]


def redline_command(run: Run, *more: str) -> list[str]:
    load = more or (
        "--concurrency", str(run.streams), "--num-requests", str(run.requests),
    )  # fmt: skip
    return [
        sys.executable, "-m", "cli.main", "bench", "--url", run.url, *load, "--input", str(run.input), "--output",
        str(OUTPUT), "--save-vllm-json", str(run.folder / "vllm.json"), "--out", str(run.folder / "run"),
    ]  # fmt: skip


def read_redline(run: Run) -> Reported:
    points = pd.read_csv(run.folder / "run" / "points.csv")
    point = points[points.phase == "closed"].iloc[-1]
    rows = pd.read_parquet(run.folder / "run" / "requests" / f"{point.point_id}.parquet")
    from_send = (rows.ttft_s - (rows.sent_s - rows.intended_s)) * 1e3
    note = f"TTFT from its own send stamp {np.percentile(from_send, 50):.3f}/{np.percentile(from_send, 99):.3f} ms; "
    note += f"{point.coalesced_reads} reads of several chunks"
    note += f"; {point.tokens_per_chunk:g} tokens a chunk" if point.tokens_per_chunk != 1 else ""
    note += f"; waited {point.generator_starved_share:.0%} of the time for its core" if run.shared_core else ""
    note += "" if point.valid else f"; INVALID: {point.reason}"
    reported = read_vllm(run)
    return Reported(reported.ttft_p50, reported.ttft_p99, reported.itl_p99, point.generator_us_per_chunk, note)


VLLM_MAIN = (Path(__file__).parents[1] / "vllm_main.py").read_text()


def vllm_command(run: Run) -> list[str]:
    return [
        os.environ["VLLM_PYTHON"], "-c", VLLM_MAIN, "bench", "serve", "--backend", "openai",
        "--base-url", run.url, "--model", "known", "--tokenizer", tokenizer(), "--dataset-name", "random",
        "--random-input-len", str(run.input), "--random-output-len", str(OUTPUT), "--ignore-eos",
        "--num-prompts", str(run.requests), "--max-concurrency", str(run.streams), "--request-rate", "inf",
        "--save-result", "--result-dir", str(run.folder), "--result-filename", "vllm.json",
    ]  # fmt: skip


def read_vllm(run: Run) -> Reported:
    data = json.loads((run.folder / "vllm.json").read_text())
    return Reported(data["median_ttft_ms"], data["p99_ttft_ms"], data["p99_itl_ms"])


def guidellm_command(run: Run) -> list[str]:
    return [
        os.environ["GUIDELLM_PYTHON"], "-m", "guidellm", "run",
        "--backend", f"kind=openai_http,target={run.url},model=known",
        "--tokenizer", f"kind=huggingface_auto,model={tokenizer()}",
        "--profile", f"kind=concurrent,streams={run.streams}",
        "--constraint", f"kind=max_requests,count={run.requests}",
        "--data", f"kind=synthetic_text,prompt_tokens={run.input},output_tokens={OUTPUT}",
        "--output", f"kind=json,path={run.folder / 'guidellm.json'}", "--disable-console",
    ]  # fmt: skip


def read_guidellm(run: Run) -> Reported:
    metrics = json.loads((run.folder / "guidellm.json").read_text())["benchmarks"][0]["metrics"]
    ttft = metrics["time_to_first_token_ms"]["successful"]
    itl = metrics["inter_token_latency_ms"]["successful"]
    return Reported(ttft["percentiles"]["p50"], ttft["percentiles"]["p99"], itl["percentiles"]["p99"])


def aiperf_command(run: Run) -> list[str]:
    return [
        os.environ["AIPERF_PYTHON"], "-m", "aiperf", "profile", "--model", "known", "--url", run.url,
        "--endpoint-type", "completions", "--streaming", "--tokenizer", tokenizer(), "--concurrency", str(run.streams),
        "--request-count", str(run.requests), "--synthetic-input-tokens-mean", str(run.input),
        "--output-tokens-mean", str(OUTPUT), "--extra-inputs", "ignore_eos:true",
        "--artifact-dir", str(run.folder), "--ui", "none",
    ]  # fmt: skip


def read_aiperf(run: Run) -> Reported:
    (path,) = run.folder.rglob("profile_export_aiperf.json")
    data = json.loads(path.read_text())
    records = data.get("records", data)
    ttft, itl = records["time_to_first_token"], records["inter_token_latency"]
    return Reported(ttft["p50"], ttft["p99"], itl["p99"])


def tokenizer() -> str:
    name = os.environ.get("TOKENIZER")
    if not name:
        sys.exit("other tools need a tokenizer for their prompts: TOKENIZER=folder or hub id")
    return name


def tools() -> list[Tool]:
    found = [Tool("redline", redline_command, read_redline)]
    if os.environ.get("VLLM_PYTHON"):
        found.append(Tool("vllm bench serve", vllm_command, read_vllm))
    if os.environ.get("GUIDELLM_PYTHON"):
        found.append(Tool("GuideLLM", guidellm_command, read_guidellm))
    if os.environ.get("AIPERF_PYTHON"):
        found.append(Tool("AIPerf", aiperf_command, read_aiperf))
    return found
