"""/v1/embeddings with a tiny encoder, and which endpoints a server has by the kind of its model."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from engine.api.http_options import HttpOptions, Limits
from tests.engine.api.conftest import InLoop
from tests.engine.api.pooling_server import pooling_server
from tests.engine.api.test_openapi import check_described
from tests.engine.pooling_models import (
    POSITIONS,
    build,
    hidden_states,
    pooled,
    write_sentence_transformers,
)

TEXTS = ["hello", "a longer text", "x", "hello"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bert")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    found = build("bert", folder, matryoshka_dimensions=[8, 16])
    write_sentence_transformers(folder, "mean_tokens")
    return found


@pytest.fixture
async def server(folder: Path, model: Any) -> AsyncIterator[InLoop]:
    assert model is not None
    async with pooling_server(folder) as running:
        yield running


def expected(model: Any, text: str, dimensions: int = 32, *, normalize: bool = True) -> np.ndarray:
    vector = pooled(hidden_states(model, list(text.encode())), "mean")[:dimensions]
    return vector / np.linalg.norm(vector) if normalize else vector


def embeddings_of(answer: dict[str, Any]) -> list[np.ndarray]:
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [np.array(one["embedding"], np.float32) for one in answer["data"]]


async def test_embeddings_are_those_of_transformers_in_order(server: InLoop, model: Any) -> None:
    answer = await server.post("/v1/embeddings", model="tiny", input=TEXTS)
    found = embeddings_of(answer)
    for one, text in zip(found, TEXTS, strict=True):
        np.testing.assert_allclose(one, expected(model, text), rtol=0, atol=1e-5)
        assert abs(np.linalg.norm(one) - 1) < 1e-5
    assert (answer["object"], answer["model"]) == ("list", "tiny")
    tokens = sum(map(len, TEXTS))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == tokens


async def test_the_four_forms_of_an_input_are_the_same(server: InLoop) -> None:
    ids = list(b"hello")
    answers = [await server.post("/v1/embeddings", input=one) for one in ("hello", ["hello"], ids, [ids])]
    assert len({str(one["data"]) for one in answers}) == 1


async def test_base64_has_the_numbers_of_floats(server: InLoop) -> None:
    floats = embeddings_of(await server.post("/v1/embeddings", input=TEXTS, encoding_format="float"))
    packed = await server.post("/v1/embeddings", input=TEXTS, encoding_format="base64")
    for one, other in zip(floats, packed["data"], strict=True):
        assert np.array_equal(one, np.frombuffer(base64.b64decode(other["embedding"]), "<f4"))


async def test_base64_of_other_numbers(server: InLoop) -> None:
    floats = embeddings_of(await server.post("/v1/embeddings", input=TEXTS))

    async def read(number_type: str, kind: str, order: str) -> list[np.ndarray]:
        options = {"encoding_format": "base64", "embed_dtype": number_type, "endianness": order}
        answer = await server.post("/v1/embeddings", input=TEXTS, **options)
        return [np.frombuffer(base64.b64decode(one["embedding"]), kind) for one in answer["data"]]

    for one, big, half, brain in zip(
        floats,
        await read("float32", ">f4", "big"),
        await read("float16", "<f2", "native"),
        await read("bfloat16", "<u2", "little"),
        strict=True,
    ):
        assert np.array_equal(one, big)
        assert np.array_equal(one.astype(np.float16), half)
        rounded = torch.from_numpy(one).to(torch.bfloat16).float().numpy()
        assert np.array_equal(rounded, (brain.astype(np.uint32) << 16).view(np.float32))


async def test_pooling_is_the_embedding(server: InLoop) -> None:
    embedded = await server.post("/v1/embeddings", input=TEXTS, dimensions=8)
    answer = await server.post("/pooling", input=TEXTS, dimensions=8, task="embed")
    assert [one["data"] for one in answer["data"]] == [one["embedding"] for one in embedded["data"]]
    assert {one["object"] for one in answer["data"]} == {"pooling"}
    assert answer["id"].startswith("pool-")
    assert (await server.refusal("/pooling", {"input": "a", "task": "classify"}))["param"] == "task"
    assert (await server.refusal("/classify", {"input": "a"}))["code"] == "wrong_model_kind"


async def test_openais_client_reads_both_forms(server: InLoop, model: Any) -> None:
    for options in ({}, {"encoding_format": "float"}, {"dimensions": 16}):
        answer = await server.openai.embeddings.create(model="tiny", input=TEXTS, **options)
        for one, text in zip(answer.data, TEXTS, strict=True):
            wanted = expected(model, text, options.get("dimensions", 32))
            np.testing.assert_allclose(np.array(one.embedding), wanted, rtol=0, atol=1e-5)
        assert answer.usage.total_tokens == sum(map(len, TEXTS))
    with pytest.raises(openai.BadRequestError, match="dimensions must be one of 8, 16"):
        await server.openai.embeddings.create(model="tiny", input="x", dimensions=5)


async def test_embeddings_without_normalization(server: InLoop, model: Any) -> None:
    wanted = expected(model, "hello", 8, normalize=False)
    for field in ("normalize", "use_activation"):
        answer = await server.post("/v1/embeddings", input="hello", dimensions=8, **{field: False})
        np.testing.assert_allclose(embeddings_of(answer)[0], wanted, rtol=0, atol=2e-5)


async def test_long_texts_are_refused_or_truncated(server: InLoop, model: Any) -> None:
    longest, text = "x" * POSITIONS, "xy" * POSITIONS
    await server.post("/v1/embeddings", input=longest)
    error = await server.refusal("/v1/embeddings", {"input": ["a", text]})
    assert error["param"] == "input"
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {POSITIONS} tokens" in error["message"]
    assert f"a text has {2 * POSITIONS} tokens" in error["message"]
    for keep, side, kept in [(-1, None, text[:POSITIONS]), (7, "right", text[:7]), (7, "left", text[-7:])]:
        options = {"truncate_prompt_tokens": keep, "truncation_side": side}
        for given in (text, list(text.encode())):
            answer = await server.post("/v1/embeddings", input=given, **options)
            assert answer["usage"]["prompt_tokens"] == len(kept)
            np.testing.assert_allclose(embeddings_of(answer)[0], expected(model, kept), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({}, "input", "input is missing"),
        ({"input": []}, "input", "input is an empty list"),
        ({"input": ["a", 3]}, "input", "mixes texts and token ids"),
        ({"input": ""}, "input", "the prompt is empty"),
        ({"input": [300]}, "input", "300 is not in the vocabulary"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "must be one of float, base64, not 'hex'"),
        ({"input": "a", "dimensions": 0}, "dimensions", "dimensions must be one of 8, 16, not 0"),
        ({"input": "a", "dimension": 8}, "dimension", "did you mean dimensions?"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "must be -1 or lie in 1..66"),
        ({"input": "a", "truncation_side": "up"}, "truncation_side", "must be 'left' or 'right'"),
        ({"input": "a", "embed_dtype": "fp8_e4m3"}, "embed_dtype", "must be one of float32, float16, bfloat16"),
        ({"input": "a", "endianness": "middle"}, "endianness", "must be one of native, little, big"),
        ({"input": "a", "normalize": True, "use_activation": False}, "use_activation", "give only one"),
        ({"input": "a", "padding": "max_length"}, "padding", "padding is not supported here"),
        ({"input": "a", "messages": [{}]}, "messages", "messages is not supported here"),
    ],
)
async def test_wrong_bodies_name_the_field(server: InLoop, body: dict[str, Any], field: str, said: str) -> None:
    error = await server.refusal("/v1/embeddings", body)
    assert error["param"] == field
    assert said in error["message"]


async def test_models_without_matryoshka_have_one_length(tmp_path: Path) -> None:
    build("bert", tmp_path)
    async with pooling_server(tmp_path) as server:
        await server.post("/v1/embeddings", input="a", dimensions=32)
        error = await server.refusal("/v1/embeddings", {"input": "a", "dimensions": 16})
        assert "embeddings of this model have 32 numbers, and it is not a matryoshka model" in error["message"]


async def test_limits_hold_for_embeddings(folder: Path, model: Any) -> None:
    assert model is not None
    limits = Limits(max_prompts=2, max_body_values=50)
    async with pooling_server(folder, HttpOptions(limits=limits)) as server:
        error = await server.refusal("/v1/embeddings", {"input": ["a", "b", "c"]})
        assert "input has 3 prompts, but at most 2 are allowed per request (--max-prompts)" in error["message"]
        await server.refusal("/v1/embeddings", {"model": "another", "input": "a"}, 404)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello"}]}),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}),
    ],
)
async def test_a_model_that_embeds_generates_nothing(server: InLoop, path: str, body: dict[str, Any]) -> None:
    error = await server.refusal(path, body)
    assert error["code"] == "wrong_model_kind"
    assert f"{path} is not available: the model of this server returns embeddings" in error["message"]
    assert "use /v1/embeddings" in error["message"]


async def test_what_all_models_have_stays(server: InLoop) -> None:
    assert (await server.post("/tokenize", prompt="hi"))["tokens"] == list(b"hi")
    assert (await server.post("/reset_prefix_cache"))["forgotten_blocks"] == 0
    assert (await server.http.get("/v1/models")).json()["data"][0]["max_model_len"] == POSITIONS
    assert (await server.http.get("/health")).json()["status"] == "ok"
    assert (await server.http.get("/ready")).status_code == 200
    assert "vllm:request_success_total" in (await server.http.get("/metrics")).text


@pytest.mark.parametrize("body", [{"input": TEXTS}, {"input": TEXTS, "encoding_format": "base64"}, {"input": []}])
async def test_answers_are_as_described(server: InLoop, body: dict[str, Any]) -> None:
    for path in ("/v1/embeddings", "/pooling"):
        check_described(await server.http.post(path, json=body), "post", path)
