"""Sampling defaults: what a generation_config.json says, and what flags make of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, ModelError
from engine.frontend.generation_defaults import GenerationDefaults, read_generation
from engine.frontend.tokenizer import Tokenizer

FIELDS = {
    "do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05,
    "max_new_tokens": 2048, "eos_token_id": [7, 9], "pad_token_id": 0, "transformers_version": "4.50",
}  # fmt: skip
SAMPLING = {
    "temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05, "max_tokens": 2048
}  # fmt: skip


def write(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "generation_config.json").write_text(json.dumps(fields))
    return folder


def test_the_models_own_file_is_read(tmp_path: Path):
    assert read_generation("auto", write(tmp_path, **FIELDS)) == GenerationDefaults(SAMPLING, (7, 9))
    assert read_generation("auto", tmp_path / "config.json").sampling == SAMPLING, "a config stands for its folder"


@pytest.mark.parametrize("source", ["none", "vllm"])
def test_without_it_only_the_ends_of_texts_stay(source: str, tmp_path: Path):
    assert read_generation(source, write(tmp_path, **FIELDS)) == GenerationDefaults({}, (7, 9))
    assert read_generation(source, write(tmp_path, temperature="hot")).sampling == {}


def test_a_folder_or_file_takes_its_place(tmp_path: Path):
    other = write(tmp_path / "other", temperature=1, eos_token_id=5)
    for source in (other, other / "generation_config.json"):
        found = read_generation(str(source), write(tmp_path / "model", **FIELDS))
        assert found == GenerationDefaults({"temperature": 1.0}, (5,))
    with pytest.raises(ConfigError, match="--generation-config /no/such"):
        read_generation("/no/such", tmp_path)


def test_nothing_is_needed_and_null_says_nothing(tmp_path: Path):
    assert read_generation("auto", tmp_path) == GenerationDefaults()
    assert read_generation("auto", write(tmp_path, temperature=None, top_k=50.0, eos_token_id=None)) == (
        GenerationDefaults({"top_k": 50})
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 1.5}, r"top_p must lie in 0..1"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"repetition_penalty": True}, "repetition_penalty must be a number"),
        ({"eos_token_id": ["<end>"]}, "eos_token_id must be a number"),
        ({"max_new_tokens": 0}, r"max_tokens must lie in 1\.\.2147483647, not 0"),
    ],
)
def test_what_cannot_hold_names_file_and_field(fields: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ModelError, match=said) as caught:
        read_generation("auto", write(tmp_path, **fields))
    assert str(tmp_path) in str(caught.value)
    assert "--generation-config none" in str(caught.value)


def test_overrides_win_and_are_checked(tmp_path: Path):
    folder = write(tmp_path, **FIELDS)
    found = read_generation("auto", folder, {"temperature": 0, "max_new_tokens": 10}).sampling
    assert found == {**SAMPLING, "temperature": 0.0, "max_tokens": 10}
    assert read_generation("none", folder, {"top_k": 3}).sampling == {"top_k": 3}
    with pytest.raises(ConfigError, match="--override-generation-config: colour is not one of temperature"):
        read_generation("auto", folder, {"colour": 1})
    with pytest.raises(ConfigError, match="--override-generation-config: top_p must lie"):
        read_generation("auto", folder, {"top_p": 2})


def test_a_request_wins_field_by_field(stand_in: Tokenizer):
    defaults = GenerationDefaults(SAMPLING, (7, 400))
    params = defaults.params(temperature=1.0, top_k=0, max_tokens=3)
    assert (params.temperature, params.top_k, params.max_tokens) == (1.0, 0, 3)
    assert (params.top_p, params.repetition_penalty) == (0.95, 1.05)
    defaults.add_eos_ids(stand_in, 300)
    assert stand_in.eos_ids == (2, 7), "ids beyond the vocabulary are left out"
    stand_in.eos_ids = (2,)
