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
