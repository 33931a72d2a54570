"""Models with images in Mistral's own format compute what a forward pass after Mistral's own code computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ModelError
from engine.model.checkpoints.mistral_tensors import as_transformers_tensors
from engine.model.checkpoints.reader import Reader
from engine.model.checkpoints.safetensors_headers import read_headers
from engine.model.checkpoints.weight_mapping import map_weights
from engine.model.encoders import llava, mistral3
from engine.model.model_info import read_hf_config
from engine.multimodal.families import MM_FAMILIES, placeholder_ids
from tests.engine.model.checkpoints.mistral_reference import (
    IMAGE,
    MERGING,
    encode_image,
    logits_of,
    write_model,
)

FORMS: dict[str, dict[str, Any]] = {
    "pixtral": {},
    "pixtral without biases": {"adapter_bias": False},
    "mistral small 3.1": MERGING,
    "max_image_size": {"image_size": None, "max_image_size": 32},
}


def loaded(folder: Path) -> Any:
    """The checkpoint as transformers' class."""
    from transformers import AutoModelForImageTextToText

    hf_config = read_hf_config(folder, EngineConfig(model=str(folder)))
    model: Any = AutoModelForImageTextToText.from_config(hf_config, dtype=torch.float32).eval()
    stored = as_transformers_tensors(read_headers(folder, "m", mistral=True), hf_config)
    values = dict(model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    mapping = map_weights(model, {name: one.shape for name, one in stored.items()}, shapes)
    assert not mapping.unused
    assert mapping.placements.keys() == shapes.keys()
    reader = Reader()
    with torch.no_grad():
        for name, [placed] in mapping.placements.items():
            reader.copy(stored[placed.stored], placed.begin, values[name].data)
    reader.close()
    return model


def pictures() -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(3, 16, 32), torch.randn(3, 32, 8)]


@pytest.mark.parametrize("form", FORMS)
def test_equals_mistrals_own_forward(form: str, tmp_path: Path) -> None:
    params, tensors = write_model(tmp_path, **FORMS[form])
    model, images = loaded(tmp_path), pictures()
    merge = model.config.to_dict().get("spatial_merge_size", 1)
    tokens, counts = [1, 2], [one[0].numel() // (4 * merge) ** 2 for one in images]
    for count in counts:
        tokens += [IMAGE] * count + [3]
    sizes = torch.tensor([one.shape[1:] for one in images])
    padded = torch.stack([torch.nn.functional.pad(one, (0, 32 - one.shape[2], 0, 32 - one.shape[1])) for one in images])
    with torch.inference_mode():
        found = model(input_ids=torch.tensor([tokens]), pixel_values=padded, image_sizes=sizes).logits[0]
        expected = logits_of(params, tensors, tokens, images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_encoder_equals_mistrals_own(form: str, tmp_path: Path) -> None:
    params, tensors = write_model(tmp_path, **FORMS[form])
    model = loaded(tmp_path)
    encoder = (mistral3 if model.config.model_type == "mistral3" else llava).make(model)
    for image in pictures():
        with torch.inference_mode():
            found = encoder.encode({"pixel_values": image[None]}).embeddings
        assert torch.allclose(found, encode_image(params, tensors, image), atol=1e-4)


def test_fields_of_the_config(tmp_path: Path) -> None:
    write_model(tmp_path)
    config = read_hf_config(tmp_path, EngineConfig(model=str(tmp_path)))
    assert config.architectures == ["LlavaForConditionalGeneration"]
    assert placeholder_ids(MM_FAMILIES[config.model_type], config) == {"image": IMAGE}
    assert (config.image_break_token_id, config.image_end_token_id) == (12, 13)
    assert config.vision_config.hidden_act == "silu"
    assert config.vision_config.rope_parameters["rope_theta"] == 1e3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "vision_encoder lacks hidden_size"),
        ({"patch_size": "4 x 4"}, "patch_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"frames": 8}, "its vision_encoder has frames, which isn't supported"),
        ({"spatial_merge_size": 2}, "only some of add_pre_mm_projector_layer_norm"),
        ({"add_pre_mm_projector_layer_norm": True}, "only some of add_pre_mm_projector_layer_norm"),
        ({**MERGING, "mm_projector_id": "other"}, "only some of"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_model(tmp_path)
    params = json.loads((tmp_path / "params.json").read_text())
    params["vision_encoder"] |= changes
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ModelError, match=message):
        read_hf_config(tmp_path, EngineConfig(model=str(tmp_path)))
