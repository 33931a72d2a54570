"""Models with a Pixtral tower: Pixtral and Mistral3, in transformers' layout and in Mistral's own format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from engine.multimodal.types import Processed
from tests.engine.model.checkpoints.mistral_files import PARTS, interleaved, params_of
from tests.engine.worker.mm_model import TEXT, MMModel, save
from tests.engine.worker.mm_models_llava import IMAGE

MISTRAL = {"model_type": "mistral", "sliding_window": None, **TEXT}
TOWER = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "hidden_act": "silu",
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 1e3},
}
BREAK, END = 12, 13
PIXTRAL_FIELDS = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
# Names of Mistral's own format; the rest is as in a text model.
OWN = {
    "model.vision_tower": "vision_encoder",
    "model.multi_modal_projector.linear_1": "vision_language_adapter.w_in",
    "model.multi_modal_projector.linear_2": "vision_language_adapter.w_out",
    "model.multi_modal_projector.norm": "pre_mm_projector_norm",
    "model.multi_modal_projector.patch_merger": "patch_merger",
    "attention.q_proj": "attention.wq",
    "attention.k_proj": "attention.wk",
    "attention.v_proj": "attention.wv",
    "attention.o_proj": "attention.wo",
    "feed_forward.gate_proj": "feed_forward.w1",
    "feed_forward.down_proj": "feed_forward.w2",
    "feed_forward.up_proj": "feed_forward.w3",
}


def build_pixtral(folder: Path) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(7)
    config = LlavaConfig(vision_config=TOWER, text_config=MISTRAL, image_token_index=IMAGE, **PIXTRAL_FIELDS)
    return save(LlavaForConditionalGeneration._from_config(config, dtype=torch.float32), folder, (IMAGE,))


def build_mistral3(folder: Path) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(7)
    config = Mistral3Config(
        vision_config=TOWER, text_config=MISTRAL, image_token_index=IMAGE, spatial_merge_size=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return save(Mistral3ForConditionalGeneration._from_config(config, dtype=torch.float32), folder, (IMAGE,))


def build_native_pixtral(folder: Path) -> Any:
    return as_mistral(build_pixtral(folder), folder)


def build_native_mistral3(folder: Path) -> Any:
    more = {
        "adapter_bias": False, "mm_projector_id": "patch_merge", "spatial_merge_size": 2,
        "add_pre_mm_projector_layer_norm": True,
    }  # fmt: skip
    return as_mistral(build_mistral3(folder), folder, **more)


def as_mistral(model: Any, folder: Path, **more: Any) -> Any:
    """Rewrite a model's folder in Mistral's own format; `more`: of vision_encoder."""
    text = model.config.text_config
    vision = {name: TOWER[name] for name in TOWER if name not in ("model_type", "hidden_act", "rope_parameters")}
    del vision["initializer_range"]
    ids = {"image_token_id": IMAGE, "image_break_token_id": BREAK, "image_end_token_id": END}
    params = params_of(text) | {"vision_encoder": {**vision, "num_channels": 3, "rope_theta": 1e3, **ids, **more}}
    (folder / "params.json").write_text(json.dumps(params))
    dims = {"decoder": params["head_dim"], "tower": TOWER["hidden_size"] // TOWER["num_attention_heads"]}
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if ".q_proj." in name or ".k_proj." in name:
            value = interleaved(value, dims["tower" if "vision_tower" in name else "decoder"])
        tensors[mistral_name(name)] = value.contiguous()
    save_file(tensors, folder / "consolidated.safetensors")
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    return model


def mistral_name(name: str) -> str:
    """The name of a tensor of transformers' class in Mistral's own format."""
    decoder = "model.language_model."
    is_decoder = name.startswith((decoder, "lm_head"))
    name = name.replace("model.language_model.embed_tokens", "model.embed_tokens")
    name = name.replace("model.language_model.norm", "model.norm").removeprefix(decoder)
    for theirs, own in (PARTS if is_decoder else OWN).items():
        name = name.replace(theirs, own)
    return name


def images(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    """The images, padded to the largest."""
    del ids
    if not processed:
        return {}
    pixels = [one.tensors["pixel_values"][0] for one in processed]
    sizes = np.array([one.shape[1:] for one in pixels])
    height, width = sizes.max(0)
    padded = [np.pad(one, [(0, 0), (0, height - one.shape[1]), (0, width - one.shape[2])]) for one in pixels]
    return {"pixel_values": torch.from_numpy(np.stack(padded)), "image_sizes": torch.from_numpy(sizes)}


def small(number: int) -> Image.Image:
    """Pictures of two shapes, within the tower's."""
    noise = np.random.default_rng(number)
    shape = (24, 16, 3) if number == 0 else (16, 24, 3)
    return Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))


MODELS = {
    "llava/pixtral": MMModel(build_pixtral, images, small),
    "mistral3": MMModel(build_mistral3, images, small),
    "llava/mistral format": MMModel(build_native_pixtral, images, small),
    "mistral3/mistral format": MMModel(build_native_mistral3, images, small),
}
