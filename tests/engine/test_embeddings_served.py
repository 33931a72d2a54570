"""Embeddings of engines in processes of their own: real weights over HTTP, several replicas, and `LLM`."""

import asyncio
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer as LibraryTokenizer
from transformers import AutoModel

from engine.config import EngineConfig
from engine.errors import RequestError
from engine.frontend.router import Router
from engine.frontend.vectors import POOLING, collect_vectors
from engine.model.resolve import resolve_model
from engine.start import start_engine
from redline import LLM
from tests.engine.pooling_models import build, hidden_states, pooled, write_sentence_transformers
from tests.serving import serve

TEXTS = [
    "How do I sort a list in Python?",
    "sorted() returns a new list.",
    "The cat sat on the mat.",
    "naïve café 日本語",
    "a " * 200,
]


@pytest.mark.real
@pytest.mark.timeout(900)
def test_minilm_has_the_embeddings_of_transformers(tmp_path: Path) -> None:
    folder = resolve_model("minilm-l6")
    tokenizer = LibraryTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    model = AutoModel.from_pretrained(folder).eval()
    with serve(tmp_path, "minilm-l6") as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
        answer = client.embeddings.create(model="minilm-l6", input=TEXTS)
        best = served.post("/v1/rerank", query=TEXTS[0], documents=TEXTS[1:], top_n=1)
        assert "embeddings of 384 numbers, mean pooling, normalized" in served.output()
        assert "KV cache" not in served.output()
    for one, text in zip(answer.data, TEXTS, strict=True):
        hidden = hidden_states(model, tokenizer.encode(text).ids)
        expected = torch.nn.functional.normalize(torch.from_numpy(hidden).mean(0), dim=0)
        np.testing.assert_allclose(np.array(one.embedding), expected.numpy(), rtol=0, atol=1e-4)
    assert best["results"][0]["document"]["text"] == TEXTS[1]


def test_replicas_of_an_encoder_share_the_prompts(tmp_path: Path) -> None:
    model = build("bert", tmp_path)
    write_sentence_transformers(tmp_path, "mean_tokens")
    prompts = [list(range(2, 3 + length)) for length in range(12)]
    engine = start_engine(EngineConfig(model=str(tmp_path), device="cpu", data_parallel_size=2, max_num_seqs=4))

    async def pool() -> list[np.ndarray]:
        client = engine.connect()
        assert isinstance(client, Router)
        client.open()
        streams = [client.add_request([one], POOLING) for one in prompts]
        vectors = [await collect_vectors(stream) for stream in streams]
        assert all(tracker.assigned_tokens for tracker in client.trackers)
        client.close()
        return [one for [one] in vectors]

    try:
        found = asyncio.run(pool())
    finally:
        engine.stop()
    for one, prompt in zip(found, prompts, strict=True):
        np.testing.assert_allclose(one, pooled(hidden_states(model, prompt), "mean"), rtol=0, atol=2e-5)


def test_llm_generates_nothing_with_a_model_that_pools(tmp_path: Path) -> None:
    build("bert", tmp_path)
    with LLM(str(tmp_path), device="cpu") as llm, pytest.raises(RequestError, match="generates no texts"):
        llm.generate("hello")


def test_llm_embeds_and_scores(tmp_path: Path) -> None:
    model = build("bert", tmp_path, matryoshka_dimensions=[8, 16])
    write_sentence_transformers(tmp_path, "mean_tokens")
    prompts = [[2, 3, 4], [5, 6]]
    expected = [pooled(hidden_states(model, prompt), "mean") for prompt in prompts]
    with LLM(str(tmp_path), device="cpu") as llm:
        plain = llm.embed(prompts, normalize=False)
        short = llm.embed(prompts[0], dimensions=8)
        [score] = llm.score("hello", "hello")
        several = llm.score("hello", ["other", "hello"])
        with pytest.raises(RequestError, match="data_2 is an empty list"):
            llm.score("hello", [])
        with pytest.raises(RequestError, match="truncate_prompt_tokens must be -1 or lie in"):
            llm.embed("hello", truncate_prompt_tokens=0)
    for found, wanted, prompt in zip(plain, expected, prompts, strict=True):
        np.testing.assert_allclose(found.outputs.embedding, wanted, rtol=0, atol=2e-5)
        assert found.prompt_token_ids == prompt
    first = expected[0][:8] / np.linalg.norm(expected[0][:8])
    np.testing.assert_allclose(short[0].outputs.embedding, first, rtol=0, atol=1e-5)
    assert score.outputs.score == pytest.approx(1, abs=1e-5)
    assert several[1].outputs.score == pytest.approx(1, abs=1e-5)
    assert several[0].outputs.score < 1 - 1e-5
    assert several[0].prompt_token_ids == list(b"helloother")


def test_llm_scores_pairs_of_a_cross_encoder(tmp_path: Path) -> None:
    model = build("bert", tmp_path, "AutoModelForSequenceClassification", num_labels=1)
    with LLM(str(tmp_path), device="cpu") as llm:
        plain = llm.score("ab", ["c", "d"], use_activation=False)
        scores = llm.score("ab", ["c", "d"])
        with pytest.raises(RequestError, match=r"use LLM\.score"):
            llm.embed("hello")
    for one, score in zip(plain, scores, strict=True):
        with torch.inference_mode():
            logit = float(model(input_ids=torch.tensor([one.prompt_token_ids])).logits[0, 0])
        assert one.outputs.score == pytest.approx(logit, abs=1e-4)
        assert score.outputs.score == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-5)
