"""Invalid adapters are refused with a reason in one line, before they are used."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelError
from engine.model.composed_decoder import decoder_of
from engine.model.lora.lora_weights import CONFIG, WEIGHTS, check_adapter, read_adapter
from tests.engine.composites import build_composite
from tests.engine.worker.lora_files import write_adapter

PATH = "model.layers.0.self_attn.q_proj"
DOWN, UP = (f"base_model.model.{PATH}.lora_{part}.weight" for part in "AB")


def model() -> torch.nn.Module:
    """Has a linear of that path."""
    root = torch.nn.Module()
    place = root
    for name in PATH.split(".")[:-1]:
        inner = torch.nn.Module()
        place.add_module(name, inner)
        place = inner
    place.add_module("q_proj", torch.nn.Linear(6, 4))
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "one", model(), ("q_proj",), 1)


def set_config(folder: Path, **changes: Any) -> None:
    config = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))


def set_tensors(folder: Path, **changes: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        full = DOWN if name == "down" else UP
        tensors[full] = change(tensors[full])
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        read_adapter(folder)
    said = str(caught.value)
    assert said.startswith(str(folder))
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_alpha": None}, "lora_alpha must be a number up to 1,000,000, not None"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number"),
        ({"lora_alpha": True}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"r": 0}, "r, the rank, must be an integer of at least 1, not 0"),
        ({"r": -4}, "r, the rank, must be an integer"),
        ({"r": 4.5}, "r, the rank, must be an integer"),
        ({"r": "4"}, "r, the rank, must be an integer"),
        ({"r": 8}, f"weights of {PATH} have rank 4, but adapter_config.json has r = 8"),
        ({"peft_type": None}, "of type None"),
        ({"peft_type": ["LORA"]}, "of type ['LORA']"),
        ({"init_lora_weights": "pissa_niter_16"}, "initialized with 'pissa_niter_16'"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_settings_that_can_not_hold_are_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    set_config(folder, **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize("text", ["[]", "[1, 2]", '"LORA"', "3", "null"])
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    assert "adapter_config.json holds a" in refusal(folder)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"r": ' + b"9" * 5000 + b"}"])
def test_a_config_that_can_not_be_read_is_refused(folder: Path, data: bytes) -> None:
    (folder / CONFIG).write_bytes(data)
    assert "isn't an adapter" in refusal(folder)


def bad(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"down": bad(float("nan"))}, f"{DOWN} has values that are not finite"),
        ({"up": bad(float("inf"))}, f"{UP} has values that are not finite"),
        ({"up": lambda up: up[:, :3].contiguous()}, f"two weights of {PATH} don't fit each other"),
        ({"down": lambda down: down[:0], "up": lambda up: up[:, :0].contiguous()}, "have rank 0"),
        ({"down": lambda down: down[0]}, "doesn't belong to a linear"),
        ({"down": lambda down: down.to(torch.int8)}, "holds torch.int8"),
        ({"down": lambda down: down > 0}, "holds torch.bool"),
        ({"up": lambda up: up * 1e38}, "is so large"),
    ],
)
def test_weights_that_are_none_are_named(folder: Path, changes: dict[str, Any], said: str) -> None:
    if "is so large" in said:
        set_config(folder, lora_alpha=1e6)
    set_tensors(folder, **changes)
    assert said in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_a_file_of_weights_that_was_cut_short_is_refused(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    assert "isn't an adapter" in refusal(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder: Path, name: str, kind: str) -> None:
    (folder / name).unlink()
    if kind == "folder":
        (folder / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(folder / name)
    assert "isn't an adapter" in refusal(folder)


@pytest.mark.parametrize("path", ["", "\0", "x" * 5000])
def test_a_path_that_is_none_is_refused(path: str) -> None:
    with pytest.raises(ModelError, match="isn't an adapter"):
        read_adapter(Path(path))


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 2.0),
        ({"lora_alpha": 3}, 0.75),
        ({"lora_alpha": 3.0, "use_rslora": True}, 1.5),
        ({"lora_alpha": "absent"}, 2.0),  # PEFT's own 8, over a rank of 4
        ({"lora_alpha": 0}, 0.0),
        ({"r": 8, "rank_pattern": {"q_proj": 4}}, 2.0),
        ({"r": "absent"}, 2.0),
        ({"init_lora_weights": "gaussian"}, 2.0),
    ],
)
def test_a_good_one_is_read_with_its_scale(folder: Path, changes: dict[str, Any], scale: float) -> None:
    set_config(folder, **changes)
    tensors = load_file(folder / WEIGHTS)
    [(path, part)] = read_adapter(folder).linears.items()
    assert path == PATH
    torch.testing.assert_close(part.down, tensors[DOWN])
    torch.testing.assert_close(part.up, tensors[UP] * scale)


def test_half_precision_and_a_byte_order_mark_are_read(folder: Path) -> None:
    set_tensors(folder, down=lambda down: down.to(torch.bfloat16), up=lambda up: up.to(torch.float16))
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    part = read_adapter(folder).linears[PATH]
    assert part.down.dtype == part.up.dtype == torch.float32


def test_adapters_of_models_with_encoders_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="take images or audio"):
        check_adapter(read_adapter(folder), decoder_of(build_composite("llava")))
