from pathlib import Path

import pytest

from engine.model.fingerprint import SAMPLE_BYTES, files_fingerprint


def write(folder: Path, weights: bytes, config: str = "{}") -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return folder


@pytest.mark.parametrize("size", [0, 10, SAMPLE_BYTES, 5 * SAMPLE_BYTES])
def test_a_copy_has_the_same_fingerprint_wherever_it_lies(tmp_path: Path, size: int):
    first, second = (write(tmp_path / name, bytes(range(256)) * (size // 256)) for name in ("a", "b"))
    (second / "tokenizer.json").write_text("{}")
    assert files_fingerprint(first) == files_fingerprint(second)
    assert files_fingerprint(first / "config.json") == files_fingerprint(second / "config.json")


@pytest.mark.parametrize("place", [0, 2 * SAMPLE_BYTES + 99, 5 * SAMPLE_BYTES - 1])
def test_other_weights_have_another(tmp_path: Path, place: int):
    weights = bytearray(5 * SAMPLE_BYTES)
    first = write(tmp_path / "a", bytes(weights))
    weights[place] = 1
    second = write(tmp_path / "b", bytes(weights))
    assert files_fingerprint(first) != files_fingerprint(second)


def test_another_configuration_or_file_has_another(tmp_path: Path):
    folders = [write(tmp_path / "a", b"w"), write(tmp_path / "b", b"w", '{"x": 1}'), write(tmp_path / "c", b"ww")]
    more = write(tmp_path / "d", b"w")
    (more / "model-2.safetensors").write_bytes(b"w")
    assert len({files_fingerprint(one) for one in (*folders, more)}) == 4
