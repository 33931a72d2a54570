"""Whether a model pools, and how: from its config, the files of sentence-transformers, and flags."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError, ModelError
from engine.memory import resolve
from engine.model.model_info import read_model_info
from engine.pooling import PoolingSpec
from tests.engine.pooling_models import BASE, write_sentence_transformers

LLAMA = {**BASE, "model_type": "llama", "num_key_value_heads": 2, "pad_token_id": None}
BERT = {**BASE, "model_type": "bert", "architectures": ["BertModel"]}


def write(folder: Path, config: dict[str, Any], **more: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def read(folder: Path, **options: Any) -> PoolingSpec | None:
    config = EngineConfig(model=str(folder), load_format="dummy", device="cpu", **options)
    return read_model_info(config).pooling


@pytest.mark.parametrize(
    ("architecture", "options", "task"),
    [
        ("LlamaForCausalLM", {}, None),
        ("LlamaForCausalLM", {"runner": "generate"}, None),
        ("LlamaForCausalLM", {"runner": "pooling"}, "embed"),
        ("LlamaForCausalLM", {"convert": "embed"}, "embed"),
        ("LlamaModel", {}, "embed"),
        ("LlamaModel", {"runner": "generate"}, None),
        ("LlamaForSequenceClassification", {}, "classify"),
        ("LlamaForSequenceClassification", {"convert": "embed"}, "embed"),
    ],
)
def test_which_decoders_pool(architecture: str, options: dict[str, Any], task: str | None, tmp_path: Path) -> None:
    write(tmp_path, LLAMA, architectures=[architecture], id2label={"0": "relevance"})
    spec = read(tmp_path, **options)
    assert (spec and spec.task) == task
    if spec is not None:
        assert (spec.method, spec.encoder, spec.whole_prompts) == ("last", False, False)
        assert spec.normalize == (task == "embed")


def test_encoders_always_pool(tmp_path: Path) -> None:
    write(tmp_path, BERT)
    assert read(tmp_path) == PoolingSpec("embed", "cls", 32, encoder=True)
    with pytest.raises(ModelError, match=r"can't generate: bert is an encoder, .* \(--runner pooling\)"):
        read(tmp_path, runner="generate")


@pytest.mark.parametrize(("mode", "method"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "last")])
def test_the_files_of_sentence_transformers_declare_the_pooling(mode: str, method: str, tmp_path: Path) -> None:
    write(tmp_path, LLAMA, architectures=["LlamaForCausalLM"])
    write_sentence_transformers(tmp_path, mode, normalize=False, most_tokens=20)
    spec = read(tmp_path)
    assert spec is not None
    assert (spec.task, spec.method, spec.normalize, spec.most_tokens) == ("embed", method, False, 20)
    assert spec.whole_prompts == (method != "last")
    config = EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu")
    assert read_model_info(config).max_model_len == 20
    longer = EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu", max_model_len=40)
    assert read_model_info(longer).max_model_len == 40


def test_the_flag_replaces_what_the_files_declare(tmp_path: Path) -> None:
    write(tmp_path, BERT)
    write_sentence_transformers(tmp_path, "mean_tokens")
    spec = read(tmp_path, pooler_config='{"pooling_type": "cls", "normalize": false}')
    assert spec is not None
    assert (spec.method, spec.normalize) == ("cls", False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"is_matryoshka": True}, (True, ())),
        ({"matryoshka_dimensions": [8, 16]}, (True, (8, 16))),
        ({}, (False, ())),
    ],
)
def test_matryoshka_models_are_declared(fields: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    write(tmp_path, BERT, **fields)
    spec = read(tmp_path)
    assert spec is not None
    assert (spec.matryoshka, spec.dimensions) == expected


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (BERT, {"quantization": "int8"}, "--quantization does not work with models that return embeddings"),
        (BERT, {"kv_cache_dtype": "int8"}, "--kv-cache-dtype does not work"),
        (BERT, {"tensor_parallel_size": 2}, "--tp does not work"),
        (BERT, {"adapters": (("a", "/a"),)}, "--lora does not work"),
        (BERT, {"speculative": "ngram"}, "--speculative does not work"),
        (BERT, {"engine": "v0"}, "--engine v0 does not work"),
        (BERT, {"ablate": ("inline-frontend",)}, "--ablate inline-frontend does not work"),
        (LLAMA, {"runner": "pooling", "convert": "none"}, "--runner pooling needs --convert embed"),
        (LLAMA, {"runner": "generate", "convert": "embed"}, "--convert embed needs --runner pooling"),
    ],
)
def test_options_that_only_generation_has(
    config: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write(tmp_path, config)
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, **options)


def test_models_that_cannot_be_pooled_are_refused(tmp_path: Path) -> None:
    write(tmp_path, LLAMA, is_causal=False)
    with pytest.raises(ModelError, match="whose tokens attend to those after them isn't supported"):
        read(tmp_path, runner="pooling")
    write(tmp_path, BERT)
    with pytest.raises(ModelError, match=r"has no classification head \(an architecture named …ForSequence"):
        read(tmp_path, convert="classify")
    write(tmp_path, BERT, architectures=["BertForSequenceClassification"])
    with pytest.raises(ModelError, match="has a classification head with 2 labels: only heads with one"):
        read(tmp_path)
    write(tmp_path, BERT)
    write_sentence_transformers(tmp_path, "max_tokens")
    with pytest.raises(ModelError, match="its pooling is pooling_mode_max_tokens; supported is one of"):
        read(tmp_path)
    modules = [{"type": "sentence_transformers.models.Dense", "path": "2_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="modules of type Dense aren't supported"):
        read(tmp_path)
    (tmp_path / "modules.json").write_text("{")
    with pytest.raises(ModelError, match="can't be read as JSON"):
        read(tmp_path)


def test_a_step_holds_a_whole_prompt_if_its_vector_depends_on_all_tokens(tmp_path: Path) -> None:
    write(tmp_path, BERT)
    config = EngineConfig(model=str(tmp_path), load_format="dummy", device="cpu", max_num_seqs=8)
    resolved = resolve(config, read_model_info(config), available=1 << 30).config
    assert resolved.max_num_batched_tokens >= BASE["max_position_embeddings"]
    assert (resolved.pools, resolved.whole_prompts, resolved.num_blocks) == (True, True, 1)
    small = EngineConfig(
        model=str(tmp_path), load_format="dummy", device="cpu", max_num_seqs=8, max_num_batched_tokens=32
    )
    with pytest.raises(ConfigError, match=r"without chunking a step must hold a whole prompt: .* \(32\) must not be"):
        resolve(small, read_model_info(small), available=1 << 30)
