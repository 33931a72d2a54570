"""AIPerf: endpoints of OpenAI's API, with a load of fixed lengths."""

import json
import sys
import tempfile
from pathlib import Path

from checking import Target, check, main, run_tool

REQUESTS, INPUT, OUTPUT = 12, 32, 16
LENGTHS = ("--streaming", "--output-tokens-mean", str(OUTPUT))
IGNORE_EOS = ("--extra-inputs", "ignore_eos:true")
SERVER_COUNTS = "--use-server-token-count"


def measure(target: Target, endpoint: str, *more: str) -> dict[str, dict[str, float]]:
    """Run a load; assert that all requests succeeded, and return the metrics."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            sys.executable, "-m", "aiperf", "profile", "--model", target.model, "--url", target.url,
            "--endpoint-type", endpoint, "--tokenizer", target.folder, "--concurrency", "4",
            "--request-count", str(REQUESTS), "--synthetic-input-tokens-mean", str(INPUT),
            "--artifact-dir", str(folder), "--ui", "none", *more,
        ]  # fmt: skip
        run_tool(command, folder, without=("HF_HUB_OFFLINE",))  # with it, AIPerf takes no folders
        (path,) = folder.rglob("profile_export_aiperf.json")
        data = json.loads(path.read_text())
    metrics: dict[str, dict[str, float]] = data.get("records", data)
    assert metrics["request_count"]["avg"] == REQUESTS, metrics["request_count"]
    assert not metrics.get("error_request_count", {"avg": 0})["avg"], metrics["error_request_count"]
    return metrics


def check_outputs(target: Target, endpoint: str) -> str:
    """Run a load of streams; assert that all outputs have the length that they asked for."""
    metrics = measure(target, endpoint, *LENGTHS, *IGNORE_EOS, SERVER_COUNTS)
    lengths = metrics["output_sequence_length"]
    assert (lengths["min"], lengths["max"]) == (OUTPUT, OUTPUT), lengths
    assert metrics["time_to_first_token"]["p50"] > 0
    assert metrics["inter_token_latency"]["p50"] > 0
    return f"{REQUESTS} requests, {OUTPUT} tokens each"


@check("completions, streamed")
def completions(target: Target) -> str:
    return check_outputs(target, "completions")


@check("chats, streamed")
def chats(target: Target) -> str:
    return check_outputs(target, "chat")


@check("responses, streamed")
def responses(target: Target) -> str:
    # AIPerf reads no usage of responses that end at their length; its own counts are of texts, tokenized again.
    mean = measure(target, "responses", *LENGTHS, *IGNORE_EOS)["output_sequence_length"]["avg"]
    assert abs(mean - OUTPUT) <= 2, mean
    return f"{REQUESTS} requests, {mean:.1f} tokens each as AIPerf counts"


@check("messages, streamed")
def messages(target: Target) -> str:
    longest = measure(target, "messages", *LENGTHS, SERVER_COUNTS)["output_sequence_length"]["max"]
    assert 0 < longest <= OUTPUT, longest  # Anthropic's API has no ignore_eos
    return f"{REQUESTS} requests, at most {longest:.0f} tokens each"


@check("embeddings", "embedding")
def embeddings(target: Target) -> str:
    measure(target, "embeddings")
    return f"{REQUESTS} requests"


if __name__ == "__main__":
    main("aiperf")
