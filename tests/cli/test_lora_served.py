"""Adapters over HTTP: as models by name, loaded and unloaded while the server answers."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tests.docs.blocks import BLOCKS
from tests.docs.runner import run_command
from tests.engine.worker.driver import build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter
from tests.engine.worker.parity import NEW, Reference, merged
from tests.serving import Served, serve

PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    folder = tmp_path_factory.mktemp("model")
    return folder, build_model("llama", folder, head_dim=16)


@pytest.fixture(scope="module")
def adapters(model: tuple[Path, torch.nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(folder / name, model[1], LLAMA, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module", params=[(), ("--pp", "2")], ids=["one rank", "pipeline stages"])
def served(
    model: tuple[Path, torch.nn.Module],
    adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Iterator[Served]:
    flags = (
        "--dtype", "float32", "--max-model-len", "128", "--api-servers", "2", "--served-model-name", "base",
        "--lora", f"one={adapters['one']}", "--enable-runtime-lora", *request.param,
    )  # fmt: skip
    with serve(tmp_path_factory.mktemp("log"), str(model[0]), *flags) as running:
        yield running


def tokens(served: Served, name: str) -> list[int]:
    body = {"model": name, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
    found: list[int] = served.post("/v1/completions", **body, ignore_eos=True)["choices"][0]["token_ids"]
    return found


def test_adapters_are_models(served: Served, model: tuple[Path, torch.nn.Module], adapters: dict[str, Path]) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    wanted = {name: merged(model[1], folder, 2.0).run(PROMPT)[0] for name, folder in adapters.items()}
    base = Reference(model[1]).run(PROMPT)[0]
    assert tokens(served, "base") == base
    assert tokens(served, "one") == wanted["one"] != base
    assert {card.id for card in client.models.list()} == {"base", "one"}
    with pytest.raises(openai.NotFoundError, match="'two' is not served here: this server has 'base', 'one'"):
        client.completions.create(model="two", prompt=PROMPT)
    load = {"lora_name": "two", "lora_path": str(adapters["two"])}
    client.post("/load_lora_adapter", body=load, cast_to=str)
    for _ in range(4):  # whichever process answers
        assert tokens(served, "two") == wanted["two"]
        assert tokens(served, "base") == base
    with pytest.raises(openai.BadRequestError, match="'two' is served already"):
        client.post("/load_lora_adapter", body=load, cast_to=str)
    with pytest.raises(openai.BadRequestError, match="isn't an adapter"):
        client.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "/nowhere"}, cast_to=str)
    with pytest.raises(openai.BadRequestError, match="it is empty or the base model's"):
        client.post("/load_lora_adapter", body={**load, "lora_name": "base"}, cast_to=str)
    client.post("/unload_lora_adapter", body={"lora_name": "two"}, cast_to=str)
    with pytest.raises(openai.BadRequestError, match="no adapter called 'two' is served"):
        client.post("/unload_lora_adapter", body={"lora_name": "two"}, cast_to=str)
    for _ in range(4):
        with pytest.raises(openai.APIStatusError, match="two"):
            client.completions.create(model="two", prompt=PROMPT)
    # Under its old name comes another: nothing of the first is left in the prefix cache.
    client.post("/load_lora_adapter", body={"lora_name": "two", "lora_path": str(adapters["one"])}, cast_to=str)
    assert tokens(served, "two") == wanted["one"]


def test_an_adapter_in_use_is_not_unloaded(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    stream = client.completions.create(
        model="one", prompt=PROMPT[:2], max_tokens=120, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(iter(stream))
    assert first.choices
    refused = None
    try:
        client.post("/unload_lora_adapter", body={"lora_name": "one"}, cast_to=str)
    except openai.BadRequestError as error:
        refused = str(error)
    rest = sum(len(chunk.choices) for chunk in stream)
    # A tiny model may be done before the server is asked: then there was nothing to refuse.
    assert refused is None or "request(s) still use 'one'" in refused
    assert rest > 50


def test_the_commands_of_the_page(served: Served, adapters: dict[str, Path], tmp_path: Path) -> None:
    """An adapter is loaded and unloaded as docs/serving/adapters.md prints it."""
    (block,) = [one for one in BLOCKS if one.page == "docs/serving/adapters.md" and one.tested_by]
    for printed in block.commands:
        command = printed.replace("/adapters/code", str(adapters["two"]))
        done = run_command(command, block.kind, tmp_path, httpx.URL(served.url).port)
        assert done.succeeded, done.output
