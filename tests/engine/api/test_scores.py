"""/v1/score and /v1/rerank with tiny models: cross-encoders, decoders with a head, and models that embed."""

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.api.conftest import InLoop
from tests.engine.api.pooling_server import pooling_server
from tests.engine.api.test_openapi import check_described
from tests.engine.frontend.pair_tokenizer import CLS, SEP, make_backend, words
from tests.engine.pooling_models import POSITIONS, build, hidden_states, pooled, write_sentence_transformers

CROSS_ENCODER = "AutoModelForSequenceClassification"
QUERY, DOCUMENTS = "a b c", ["d e", "x", "a b c", "d e f g h", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cross-encoder")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return build("bert", folder, CROSS_ENCODER, num_labels=1)


@pytest.fixture
async def server(folder: Path, model: Any) -> AsyncIterator[InLoop]:
    assert model is not None
    async with pooling_server(folder, backend=make_backend()) as running:
        yield running


@torch.inference_mode()
def logit(model: Any, first: str, second: str) -> float:
    ids = [CLS, *words(first), SEP, *words(second), SEP]
    types = [0] * (len(words(first)) + 2) + [1] * (len(words(second)) + 1)
    return float(model(input_ids=torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0, 0])


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def scores_of(answer: dict[str, Any]) -> list[float]:
    assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
    return [one["score"] for one in answer["data"]]


async def test_a_cross_encoder_scores_as_transformers(server: InLoop, model: Any) -> None:
    answer = await server.post("/v1/score", model="tiny", text_1=QUERY, text_2=DOCUMENTS)
    expected = [sigmoid(logit(model, QUERY, one)) for one in DOCUMENTS]
    np.testing.assert_allclose(scores_of(answer), expected, rtol=0, atol=1e-5)
    assert max(expected) - min(expected) > 1e-3
    assert answer["usage"]["prompt_tokens"] == sum(6 + len(words(one)) for one in DOCUMENTS)
    pairs = await server.post("/v1/score", text_1=DOCUMENTS, text_2=DOCUMENTS[::-1])
    mirrored = [sigmoid(logit(model, *one)) for one in zip(DOCUMENTS, DOCUMENTS[::-1], strict=True)]
    np.testing.assert_allclose(scores_of(pairs), mirrored, rtol=0, atol=1e-5)


async def test_documents_are_ordered_by_their_scores(server: InLoop, model: Any) -> None:
    answer = await server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS)
    scores = [sigmoid(logit(model, QUERY, one)) for one in DOCUMENTS]
    order = sorted(range(len(DOCUMENTS)), key=lambda index: -scores[index])
    assert [one["index"] for one in answer["results"]] == order
    assert [one["document"]["text"] for one in answer["results"]] == [DOCUMENTS[index] for index in order]
    np.testing.assert_allclose([one["relevance_score"] for one in answer["results"]], sorted(scores)[::-1], atol=1e-5)
    few = await server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=False)
    assert few["results"] == [{key: one[key] for key in ("index", "relevance_score")} for one in answer["results"][:2]]


async def test_long_documents_are_refused_or_truncated(server: InLoop, model: Any) -> None:
    document = "d " * POSITIONS
    for path, body, field in (
        ("/v1/score", {"text_1": QUERY, "text_2": [document]}, "text_2"),
        ("/score", {"queries": QUERY, "items": [document]}, "items"),
        ("/rerank", {"query": QUERY, "documents": [document]}, "documents"),
    ):
        error = await server.refusal(path, body)
        assert (error["param"], error["code"]) == (field, "context_length_exceeded")
        assert f"a text has {POSITIONS + 6} tokens" in error["message"]
    answer = await server.post("/v1/score", text_1=QUERY, text_2=document, truncate_prompt_tokens=-1)
    assert answer["usage"]["prompt_tokens"] == POSITIONS
    assert abs(scores_of(answer)[0] - sigmoid(logit(model, QUERY, "d " * (POSITIONS - 6)))) < 1e-5
    body = {"text_1": QUERY, "text_2": document, "truncate_prompt_tokens": 6}
    assert (await server.refusal("/v1/score", body))["param"] == "truncate_prompt_tokens"


async def test_other_names_of_endpoints_and_fields(server: InLoop) -> None:
    expected = scores_of(await server.post("/v1/score", text_1=QUERY, text_2=DOCUMENTS))
    for first, second in (("queries", "documents"), ("queries", "items"), ("data_1", "data_2")):
        assert scores_of(await server.post("/score", **{first: QUERY, second: DOCUMENTS})) == expected
    ranked = (await server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS))["results"]
    objects = [{"text": one} for one in DOCUMENTS]
    for path, documents in (("/rerank", DOCUMENTS), ("/v2/rerank", objects)):
        assert (await server.post(path, query=QUERY, documents=documents))["results"] == ranked
    [one] = (await server.post("/rerank", query=QUERY, documents=DOCUMENTS[0]))["results"]
    assert one["relevance_score"] == expected[0]


async def test_texts_are_cut_one_by_one(server: InLoop, model: Any) -> None:
    answer = await server.post("/score", text_1=QUERY, text_2=DOCUMENTS, max_tokens_per_query=2, max_tokens_per_doc=1)
    expected = [sigmoid(logit(model, "a b", one[:1])) for one in DOCUMENTS]
    np.testing.assert_allclose(scores_of(answer), expected, rtol=0, atol=1e-5)
    plain = await server.post("/score", text_1=QUERY, text_2=DOCUMENTS, use_activation=False)
    logits = [logit(model, QUERY, one) for one in DOCUMENTS]
    np.testing.assert_allclose(scores_of(plain), logits, rtol=0, atol=1e-4)


async def test_single_texts_have_a_class(server: InLoop) -> None:
    answer = await server.post("/classify", input=DOCUMENTS)
    assert {(one["label"], one["num_classes"]) for one in answer["data"]} == {("LABEL_0", 1)}
    pooled_answer = await server.post("/pooling", input=DOCUMENTS, task="classify")
    for one, other in zip(answer["data"], pooled_answer["data"], strict=True):
        assert 0 < one["probs"][0] < 1
        np.testing.assert_allclose(other["data"], one["probs"], rtol=0, atol=1e-6)
    assert (await server.post("/classify", input=DOCUMENTS, use_activation=False))["data"][0]["probs"] != answer["data"]
    error = await server.refusal("/classify", {"input": "d " * POSITIONS})
    assert error["param"] == "input"


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/score", {"text_1": "a"}, "text_2 is missing"),
        ("/v1/score", {"text_1": "a", "text_2": []}, "text_2 is an empty list"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a"]}, "text_1 has 2 texts and text_2 1"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "truncation_side": "left"}, "leave truncation_side out"),
        ("/v1/score", {}, "text_1 is missing"),
        ("/v1/score", {"queries": "a"}, "documents is missing"),
        ("/v1/score", {"queries": "a", "documents": []}, "documents is an empty list"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "items": "c"}, "items is given beside text_1 and text_2"),
        ("/v1/score", {"text_1": "a", "text_2": "b", "max_tokens_per_doc": -1}, "max_tokens_per_doc must be 0 (all)"),
        ("/v1/rerank", {"query": "a", "documents": ["b", {"image": "c"}]}, "documents[1] must be a text"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "instruction": "c"}, "instruction is not supported here"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents is an empty list"),
        ("/v1/rerank", {"query": "a", "documents": ["b"], "top_n": -1}, "top_n must be at least 1, or 0 for all"),
        ("/v1/rerank", {"query": "a", "documents": ["b"] * 1025}, "documents has 1,025 prompts, but at most 1,024"),
    ],
)
async def test_wrong_bodies_are_refused(server: InLoop, path: str, body: dict[str, Any], said: str) -> None:
    assert said in (await server.refusal(path, body))["message"]


async def test_a_cross_encoder_has_neither_embeddings_nor_texts(server: InLoop) -> None:
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/completions", {"prompt": "a"})):
        error = await server.refusal(path, body)
        assert "returns scores of a classification head and generates no texts: use /score" in error["message"]


async def test_the_activation_that_the_model_names(tmp_path: Path) -> None:
    named = "torch.nn.modules.linear.Identity"
    model = build("bert", tmp_path, CROSS_ENCODER, num_labels=1, sbert_ce_default_activation_function=named)
    async with pooling_server(tmp_path, backend=make_backend()) as server:
        answer = await server.post("/v1/score", text_1=QUERY, text_2=DOCUMENTS)
        expected = [logit(model, QUERY, one) for one in DOCUMENTS]
        np.testing.assert_allclose(scores_of(answer), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
async def test_cross_encoders_without_segments(kind: str, tmp_path: Path) -> None:
    """Of the tokenizer's segments nothing is passed to classes that have none."""
    model = build(kind, tmp_path, CROSS_ENCODER, num_labels=1, type_vocab_size=1)
    async with pooling_server(tmp_path, backend=make_backend()) as server:
        answer = await server.post("/v1/score", text_1=QUERY, text_2="d e")
    with torch.inference_mode():
        ids = torch.tensor([[CLS, *words(QUERY), SEP, *words("d e"), SEP]])
        expected = float(model(input_ids=ids).logits[0, 0])
    assert abs(scores_of(answer)[0] - sigmoid(expected)) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
async def test_a_decoder_with_a_head_scores_by_the_last_token(kind: str, tmp_path: Path) -> None:
    model = build(kind, tmp_path, CROSS_ENCODER, num_labels=1)
    async with pooling_server(tmp_path, backend=make_backend("$A [SEP] $B [SEP]")) as server:
        answer = await server.post("/v1/score", text_1=QUERY, text_2=DOCUMENTS)
    for found, document in zip(scores_of(answer), DOCUMENTS, strict=True):
        hidden = hidden_states(model.model, [*words(QUERY), SEP, *words(document), SEP])
        expected = float(model.score.weight.detach().numpy()[0] @ hidden[-1])
        assert abs(found - sigmoid(expected)) < 1e-5


async def test_a_model_that_embeds_scores_by_the_cosine(tmp_path: Path) -> None:
    model = build("bert", tmp_path)
    write_sentence_transformers(tmp_path, "mean_tokens", normalize=False)
    async with pooling_server(tmp_path, backend=make_backend()) as server:
        answer = await server.post("/v1/rerank", query=QUERY, documents=DOCUMENTS)
        cut = await server.post("/score", text_1="a b x", text_2="x b", max_tokens_per_query=2, max_tokens_per_doc=1)
        for body, field in (
            ({"text_1": "a " * POSITIONS, "text_2": "b"}, "text_1"),
            ({"text_1": "b", "text_2": "a " * POSITIONS}, "text_2"),
        ):
            assert (await server.refusal("/score", body))["param"] == field
    made = {text: pooled(hidden_states(model, [CLS, *words(text), SEP]), "mean") for text in {QUERY, *DOCUMENTS}}
    for one in answer["results"]:
        first, second = made[QUERY], made[DOCUMENTS[one["index"]]]
        cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
        assert abs(one["relevance_score"] - cosine) < 1e-5
    assert answer["results"][0]["index"] == 2
    first, second = [pooled(hidden_states(model, [CLS, *words(text), SEP]), "mean") for text in ("a b", "x")]
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert abs(scores_of(cut)[0] - cosine) < 1e-5
    # The query equals a document, and two documents are equal: each is computed once.
    assert answer["usage"]["total_tokens"] == sum(len(words(text)) + 2 for text in made)


CASES = [
    ("/v1/score", {"text_1": QUERY, "text_2": DOCUMENTS}),
    ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS}),
    ("/v1/rerank", {"query": QUERY, "documents": DOCUMENTS, "return_documents": False}),
    ("/v1/rerank", {"query": QUERY}),
    ("/v2/rerank", {"query": QUERY, "documents": DOCUMENTS}),
    ("/score", {"queries": QUERY, "documents": DOCUMENTS}),
    ("/classify", {"input": DOCUMENTS}),
    ("/pooling", {"input": DOCUMENTS}),
]


@pytest.mark.parametrize(("path", "body"), CASES)
async def test_answers_are_as_described(server: InLoop, path: str, body: dict[str, Any]) -> None:
    check_described(await server.http.post(path, json=body), "post", path)
