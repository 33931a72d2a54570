"""From names to folders."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from engine.errors import ModelError
from engine.model import resolve
from engine.model.resolve import cached_tokenizer, resolve_model, resolve_tokenizer


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


def test_a_hub_id_without_weights_names_the_configs_that_are_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"can't be fetched from the hub: .*; configs that are here are deepseek-r1, "):
        resolve_model("somebody/something", dummy=True)
    with pytest.raises(ModelError, match="configs that are here are"):
        resolve_tokenizer("somebody/something", weights=False)
    assert not [path for path in cache.rglob("*") if "something" in path.name and path.is_dir()]


def test_files_without_weights_have_a_folder_of_their_own(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked: list[list[str]] = []

    def snapshot(
        name: str, allow_patterns: list[str], local_files_only: bool = False, local_dir: Path | None = None
    ) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError(name)
        asked.append(allow_patterns)
        assert local_dir is not None
        (local_dir / "config.json").write_text("{}")
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = resolve_model("somebody/something", dummy=True)
    assert (found / "config.json").is_file()
    assert found == resolve_model("somebody/something", dummy=True)
    assert len(asked) == 1
    assert "*.safetensors" not in asked[0]


def test_the_tokenizer_in_the_cache_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached_tokenizer("somebody/something") is None
    assert cached_tokenizer("something") is None
    snapshot = tmp_path / "models--somebody--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    (snapshot / "tokenizer.json").write_text("{}")
    assert cached_tokenizer("somebody/something") == snapshot


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
