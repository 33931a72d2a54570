"""From names to folders."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.model import resolve
from engine.model.resolve import resolve_model, resolve_tokenizer


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "redline" / "models"


def test_a_folder_is_itself(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model(str(tmp_path)) == tmp_path
    assert resolve_model(str(tmp_path / "config.json")) == tmp_path


def test_a_lone_config_file_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "llama-8b.json"
    file.write_text("{}")
    assert resolve_model(str(file)) == file


def test_a_tokenizers_folder_needs_no_config(tmp_path: Path) -> None:
    assert resolve_tokenizer(str(tmp_path)) == tmp_path
    with pytest.raises(ModelError, match=str(tmp_path / "nothing")):
        resolve_tokenizer(str(tmp_path / "nothing"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_path_that_does_not_exist_is_no_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match="doesn't exist: give a folder"):
        resolve_model(name)


def test_folders_and_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="isn't a model"):
        resolve_model(str(tmp_path / "notes.txt"))


def test_a_hub_id_without_a_hub_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="somebody/something is neither a folder here nor one of minilm-l6, smol"):
        resolve_model("somebody/something")


def test_a_known_model_needs_no_hub_for_dummy_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    name = "meta-llama/Meta-Llama-3.1-70B-Instruct"
    assert resolve_model(name, dummy=True).name == "llama-3.1-70b.json"
    with pytest.raises(ModelError, match="--load-format dummy runs it with random weights"):
        resolve_model(name)


def test_the_cache_is_filled_once_also_by_two_at_once(cache: Path) -> None:
    builds, told, found = [], [], []

    def build(to: Path) -> None:
        builds.append(to)
        time.sleep(0.2)
        (to / "config.json").write_text("{}")

    def use() -> None:
        found.append(resolve._cached("some-model", build, told.append))

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / "some-model"] * 3
    assert len(builds) == 1
    assert (cache / "some-model" / "config.json").exists()
    assert "another process is preparing the model: waiting for it" in told


def test_a_failed_build_leaves_nothing_half_done(cache: Path) -> None:
    def fail(to: Path) -> None:
        (to / "half").write_text("x")
        raise ModelError("no")

    with pytest.raises(ModelError):
        resolve._cached("some-model", fail, lambda _: None)
    assert [path.name for path in cache.iterdir()] == [".some-model.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="XDG_CACHE_HOME"):
        resolve_model("smollm2-135m")


def test_a_broken_gguf_file_is_one_line(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match=r"broken\.gguf can't be converted") as caught:
        resolve_model(str(file))
    assert "\n" not in str(caught.value)


def test_resolving_needs_no_torch() -> None:
    code = "import sys, engine.model.resolve; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
