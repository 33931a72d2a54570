"""GuideLLM: each of its request formats, with a load of fixed lengths."""

import json
import sys
import tempfile
from pathlib import Path

from checking import Target, check, main, run_tool

REQUESTS, INPUT, OUTPUT = 12, 32, 16


def measure(target: Target, endpoint: str) -> str:
    """Run a load; assert that all requests succeeded with the outputs that they asked for."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report = folder / "report.json"
        command = [
            sys.executable, "-m", "guidellm", "run",
            "--backend", f"kind=openai_http,target={target.url},model={target.model},request_format={endpoint}",
            "--tokenizer", f"kind=huggingface_auto,model={target.folder}",
            "--profile", "kind=concurrent,streams=4",
            "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--data", f"kind=synthetic_text,prompt_tokens={INPUT},output_tokens={OUTPUT}",
            "--output", f"kind=json,path={report}", "--disable-console",
        ]  # fmt: skip
        run_tool(command, folder)
        metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    assert totals["successful"] == REQUESTS, totals
    assert totals["errored"] == 0, totals
    outputs = metrics["output_token_count"]["successful"]
    assert (outputs["min"], outputs["max"]) == (OUTPUT, OUTPUT), outputs
    assert metrics["time_to_first_token_ms"]["successful"]["median"] > 0
    assert metrics["inter_token_latency_ms"]["successful"]["median"] > 0
    return f"{REQUESTS} requests, {OUTPUT} tokens each"


@check("completions")
def completions(target: Target) -> str:
    return measure(target, "/v1/completions")


@check("chats")
def chats(target: Target) -> str:
    return measure(target, "/v1/chat/completions")


@check("responses")
def responses(target: Target) -> str:
    return measure(target, "/v1/responses")


if __name__ == "__main__":
    main("guidellm")
