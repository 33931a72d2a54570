"""`redline serve` of a folder in Mistral's own format: chats and completions over HTTP, on one and two ranks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.frontend.tokenizer import load_tokenizer
from redline import LLM, SamplingParams
from tests.engine.model.checkpoints.mistral_files import TEKKEN_SIZE, build_mistral, write_tekken
from tests.serving import Served, serve

NEW = 12
FLAGS = ("--dtype", "float32", "--kv-cache-memory-bytes", "8MiB", "--max-num-seqs", "8", "--served-model-name", "m")
TEXTS = ("the quick fox", "日本 in the end", "x")
MESSAGES = [{"role": "system", "content": "quick"}, {"role": "user", "content": "[INST] the lazy fox"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    write_tekken(folder)
    windows = {"sliding_window": [9, None, 9]}
    return build_mistral(
        "ministral", folder, windows, vocab_size=TEKKEN_SIZE, head_dim=16, max_position_embeddings=4096
    )


def expected(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    more = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **more)[0, len(prompt) :].tolist()


def ask(server: Served, path: str, **body: Any) -> dict[str, Any]:
    more = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "return_token_ids": True}
    return server.post(path, model="m", **more, **body)


@pytest.mark.parametrize("flags", [("--tokenizer-mode", "mistral", "--api-servers", "2"), ("--tp", "2")])
def test_chats_and_completions_over_http(flags: tuple[str, ...], folder: Path, model: Any, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(folder)
    with serve(tmp_path, str(folder), *FLAGS, *flags) as server:
        with ThreadPoolExecutor(len(TEXTS)) as pool:
            answers = list(pool.map(lambda text: ask(server, "/v1/completions", prompt=text), TEXTS))
        for text, answer in zip(TEXTS, answers, strict=True):
            tokens = answer["choices"][0]["token_ids"]
            assert tokens == expected(model, tokenizer.encode(text))
            assert answer["choices"][0]["text"] == tokenizer.decode(tokens)
        prompt = tokenizer.render_chat(MESSAGES)
        chat = ask(server, "/v1/chat/completions", messages=MESSAGES)
        tokens = chat["choices"][0]["token_ids"]
        assert tokens == expected(model, prompt)
        assert chat["choices"][0]["message"]["content"] == tokenizer.decode(tokens)
        assert chat["usage"]["prompt_tokens"] == len(prompt)
        long = [{"role": "user", "content": "the lazy fox " * 400}]
        answer = ask(server, "/v1/chat/completions", messages=long)
        assert answer["usage"]["prompt_tokens"] == len(tokenizer.render_chat(long))
        assert server.post("/tokenize", messages=MESSAGES)["tokens"] == prompt
        assert server.post("/detokenize", tokens=prompt)["prompt"].startswith("<s>[SYSTEM_PROMPT]quick")
        wrong = {"messages": [{"role": "narrator", "content": "x"}]}
        refused = server.client.post("/v1/chat/completions", json=wrong)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages"


def test_the_python_api_chats(folder: Path, model: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with LLM(str(folder), dtype="float32", max_num_seqs=2, kv_cache_memory_bytes=8 << 20) as llm:
        prompt = llm.tokenizer.render_chat(MESSAGES)
        answer = llm.chat(MESSAGES, params)[0]
        assert answer.prompt_token_ids == prompt
        assert answer.outputs[0].token_ids == expected(model, prompt)


def test_a_core_that_tokenises_itself_reads_them_too(folder: Path, model: Any, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(folder)
    with serve(tmp_path, str(folder), *FLAGS, "--ablate", "inline-frontend") as server:
        tokens = expected(model, tokenizer.encode(TEXTS[0]))
        assert ask(server, "/v1/completions", prompt=TEXTS[0])["choices"][0]["text"] == tokenizer.decode(tokens)
        tokens = expected(model, tokenizer.render_chat(MESSAGES))
        content = ask(server, "/v1/chat/completions", messages=MESSAGES)["choices"][0]["message"]["content"]
        assert content == tokenizer.decode(tokens)
