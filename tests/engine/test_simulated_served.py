"""`redline serve --device sim:NAME`: the whole server, with tokens that come when they would on the hardware."""

import base64
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serving import Served, serve

LLAMA = "meta-llama/Meta-Llama-3.1-8B-Instruct"
FLAGS = ("--device", "sim:h100", "--max-model-len", "4096")
TOKENS = 40
STEP_S = 0.005  # less than a step that reads 16 GB of weights at 3.35 TB/s


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("served"), LLAMA, *FLAGS, "--dp", "2") as served:
        yield served


@pytest.fixture(scope="module")
def v0(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ("--engine", "v0", "--simulated-tokens", "echo", "--tp", "4")
    with serve(tmp_path_factory.mktemp("v0"), "llama-3.3-70b", *FLAGS, *flags) as served:
        yield served


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("images"), "qwen2-vl-small", *FLAGS) as served:
        yield served


def complete(server: Served, model: str = LLAMA, **fields: Any) -> dict[str, Any]:
    return server.post("/v1/completions", **{"model": model, "prompt": [1, 2, 3], "max_tokens": TOKENS, **fields})


def test_tokens_take_their_time_and_are_those_of_the_seed(server: Served) -> None:
    begun = time.monotonic()
    first = complete(server, seed=5, return_token_ids=True)
    assert time.monotonic() - begun > TOKENS * STEP_S
    second, greedy = complete(server, seed=5, return_token_ids=True), complete(server, temperature=0)
    ids = first["choices"][0]["token_ids"]
    assert len(ids) == first["usage"]["completion_tokens"] == TOKENS
    assert ids == second["choices"][0]["token_ids"]
    assert max(ids) > 10_000
    assert greedy["choices"][0]["text"] == complete(server, temperature=0)["choices"][0]["text"]
    assert first["choices"][0]["finish_reason"] == "length"


def test_everything_says_that_it_is_simulated(server: Served) -> None:
    shown = server.output()
    assert re.search(r"device +sim:h100 \(simulated: NVIDIA H100 SXM 80 GB\)", shown)
    assert "tokens are random, and times are those of a latency model" in shown
    assert "simulated" in complete(server)["system_fingerprint"]
    assert server.client.get("/version").json()["simulated"] == "NVIDIA H100 SXM 80 GB"
    assert 'device="sim:h100 (simulated' in server.client.get("/metrics").text


def test_chats_are_streamed_and_counted(server: Served) -> None:
    before = server.metric("vllm:generation_tokens_total")
    body = {
        "model": LLAMA, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    with server.client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 8
    assert server.metric("vllm:generation_tokens_total") == before + 8


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("/v1/completions", {"logprobs": 1}, "logprobs is not possible on simulated hardware"),
        ("/v1/completions", {"logit_bias": {"5": 1}}, "logit_bias is not possible on simulated hardware"),
        (
            "/v1/chat/completions", {"response_format": {"type": "json_object"}},
            "structured output, such as a JSON schema or a forced tool call, is not possible on simulated hardware",
        ),
        ("/v1/embeddings", {"input": "hello"}, "generates"),
    ],
)  # fmt: skip
def test_what_needs_a_model_is_refused(server: Served, path: str, fields: dict[str, Any], message: str) -> None:
    prompt: dict[str, Any] = {"prompt": "hello"}
    if "chat" in path:
        prompt = {"messages": [{"role": "user", "content": "hello"}]}
    answer = server.client.post(path, json={"model": LLAMA, "max_tokens": 4, **prompt, **fields})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


def test_v0_echoes_a_text_up_to_its_stop_string(v0: Served) -> None:
    answer = complete(v0, "llama-3.3-70b", prompt="one two three. four", stop=".")
    assert answer["choices"][0]["text"] == "one two three"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "4 x NVIDIA H100" in v0.output()
    assert "V0 (emulated)" in v0.output()


def test_v0_waits_for_its_host(v0: Served) -> None:
    begun = time.monotonic()
    complete(v0, "llama-3.3-70b", max_tokens=TOKENS)
    assert time.monotonic() - begun > TOKENS * 2 * STEP_S  # 35 GB on each of four ranks


def test_images_are_processed_and_have_their_tokens(images: Served) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (640, 480), (200, 30, 30)).save(picture, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url}}]
    body = {"model": "qwen2-vl-small", "max_tokens": 5, "messages": [{"role": "user", "content": parts}]}
    usage = images.post("/v1/chat/completions", **body)["usage"]
    assert usage["completion_tokens"] == 5
    assert usage["prompt_tokens"] > 23 * 17  # pixels of 28 x 28
    assert images.post("/v1/chat/completions", **body)["usage"]["prompt_tokens_details"]["cached_tokens"] > 300


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="no such hardware; known are a100, b200, h100, h200"),
        serve(tmp_path, LLAMA, "--device", "sim:h1000"),
    ):
        pass
    output = next(tmp_path.glob("*.log")).read_text()
    assert len([line for line in output.splitlines() if line.strip()]) == 1
