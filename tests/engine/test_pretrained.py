"""The custom code of a model is never run, and the user is not prompted to allow it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.workloads.encoding import local_tokenizer
from engine.config import EngineConfig
from engine.errors import ModelError
from engine.frontend.tokenizer import load_tokenizer
from engine.model.model_info import read_model_info
from tests.tiny import TINY

ROOT = Path(__file__).resolve().parents[2]
CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Own: pass\n"
MODEL_MAP = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with custom code, in a process in which a prompt fails the test."""

    def ask(prompt: str) -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    (tmp_path / "own.py").write_text(CODE)
    return tmp_path


def write(folder: Path, file: str, **fields: Any) -> None:
    (folder / file).write_text(json.dumps(fields))


def assert_not_run(folder: Path) -> None:
    assert not list(folder.rglob("ran"))


def test_a_model_that_needs_its_own_code_is_refused_with_the_reason(folder: Path) -> None:
    write(folder, "config.json", **TINY | {"model_type": "own", "auto_map": MODEL_MAP})
    with pytest.raises(ModelError, match=r"auto_map in config\.json names own\.Own.*never run.*type 'own'") as caught:
        read_model_info(EngineConfig(model=str(folder), load_format="dummy"))
    assert "\n" not in str(caught.value)
    assert_not_run(folder)


def test_a_model_that_transformers_has_a_class_for_runs_as_that_and_says_so(folder: Path) -> None:
    write(folder, "config.json", **TINY | {"auto_map": MODEL_MAP})
    model_info = read_model_info(EngineConfig(model=str(folder), load_format="dummy"))
    assert model_info.architecture == "LlamaForCausalLM"
    assert any("auto_map" in warning for warning in model_info.warnings)
    assert_not_run(folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_config_would_have_fetched_from_the_hub_are_not(key: str, folder: Path) -> None:
    from engine.model.loading.open_model import open_model

    write(folder, "config.json", **TINY | {key: "somebody/kernels"})
    config = EngineConfig(model=str(folder), load_format="dummy")
    model = open_model(config, read_model_info(config)).model
    assert "somebody/kernels" not in str(vars(model.config))


@pytest.mark.parametrize(
    "named", [{"AutoTokenizer": ["own.Own", None]}, ["own.Own", None], {"AutoTokenizer": "own.Own"}]
)
@pytest.mark.parametrize("file", ["tokenizer.model", "own.tiktoken"])
def test_a_tokenizer_that_is_code_is_refused_in_engine_and_bench(named: Any, file: str, folder: Path) -> None:
    write(folder, "config.json", **TINY | {"model_type": "own", "auto_map": MODEL_MAP})
    write(folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=named)
    (folder / file).write_bytes(b"pieces")
    message = r"auto_map in tokenizer_config\.json names own\.Own.*never run: .*--tokenizer"
    with pytest.raises(ModelError, match=message):
        load_tokenizer(folder, TINY["vocab_size"])
    with pytest.raises(BenchError, match=message):
        local_tokenizer(str(folder))
    assert_not_run(folder)


def test_a_tokenizer_json_is_taken_without_the_code_beside_it(folder: Path) -> None:
    from tests.engine.frontend.conftest import byte_level_library

    byte_level_library().save(str(folder / "tokenizer.json"))
    write(
        folder, "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": ["own.Own", None]}
    )
    tokenizer, warnings = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    assert any("auto_map" in warning for warning in warnings)
    assert local_tokenizer(str(folder)).encode("the fox").ids == tokenizer.encode("the fox")
    assert_not_run(folder)


def test_a_server_does_not_ask_its_terminal(folder: Path) -> None:
    write(folder, "config.json", **TINY | {"model_type": "own", "auto_map": MODEL_MAP})
    command = [sys.executable, "-m", "cli.main", "serve", str(folder), "--load-format", "dummy", "--port", "0"]
    done = subprocess.run(command, input="y\ny\ny\n", check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "auto_map" in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert_not_run(folder)


def test_transformers_auto_classes_are_used_nowhere_else() -> None:
    """So that no further reader can forget to refuse: the conversion of GGUF files says the same by itself."""
    calls = re.compile(r"\.from_pretrained\((?!.*NO_REMOTE_CODE)|\.from_config\((?!.*NO_REMOTE_CODE)")
    found = []
    for package in ("engine", "bench", "cli", "plots"):
        for file in (ROOT / package).rglob("*.py"):
            text = re.sub(r"\n\s+", " ", file.read_text())
            found += [str(file.relative_to(ROOT)) for line in text.splitlines() if calls.search(line)]
    assert not found
