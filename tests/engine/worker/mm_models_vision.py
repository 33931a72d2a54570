"""Qwen-VL, Gemma 3, InternVL, Idefics3 and SmolVLM."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.multimodal.types import Processed, Video
from tests.engine.worker.mm_model import TEXT, MMModel, save

FIRST_SPECIAL = 96  # after printable characters, space and line break
IMAGE, VIDEO, START, END = range(FIRST_SPECIAL, FIRST_SPECIAL + 4)
SPECIAL_TOKENS: dict[str, Sequence[str]] = {
    "qwen": ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    "gemma3": ("<image_soft_token>", "<unused>", "<start_of_image>", "<end_of_image>"),
    "internvl": ("<IMG_CONTEXT>", "<video>", "<img>", "</img>"),
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        (
            "<image>",
            "<fake_token_around_image>",
            "<global-img>",
            *(f"<row_{row}_col_{column}>" for row in range(1, 3) for column in range(1, 3)),
            "<video>",
        ),
    ),
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
PATCHES = {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2}
WIDE = {"initializer_range": 0.15}
TILE = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48, **WIDE}
SQUARE = 8 * 8  # pixels of an embedding of the Qwen-VL models
SIZES = {"min_pixels": 2 * SQUARE, "max_pixels": 6 * SQUARE, "patch_size": 4}
IDEFICS3 = {
    "image_token_id": IMAGE,
    "text_config": {**TEXT, "model_type": "llama"},
    "vision_config": {**TILE, "image_size": 16, "patch_size": 4},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        **QWEN_IDS,
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**PATCHES, **WIDE, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        **QWEN_IDS,
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {
            **PATCHES,
            **WIDE,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 3,
        },
    },
    "qwen3_vl": {
        **QWEN_IDS,
        "text_config": {**TEXT, "head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": {
            **PATCHES,
            **WIDE,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    },
    "gemma3": {
        "image_token_index": IMAGE,
        "boi_token_index": START,
        "eoi_token_index": END,
        "mm_tokens_per_image": 4,
        "text_config": {
            **TEXT,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {**TILE, "model_type": "siglip_vision_model", "image_size": 16, "patch_size": 4},
    },
    "internvl": {
        "image_token_id": IMAGE,
        "image_seq_length": 4,
        "tie_word_embeddings": False,  # with equal ones the tiny model repeats its input
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**TILE, "image_size": [16, 16], "patch_size": [4, 4]},
    },
    "idefics3": IDEFICS3,
    "smolvlm": IDEFICS3,
}
TILES = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), SIZES),
    "gemma3": {"size": {"height": 16, "width": 16}},
    "internvl": {"size": {"height": 16, "width": 16}, "max_patches": 3},
    "idefics3": TILES,
    "smolvlm": TILES,
}
SEEDS = {"gemma3": 11}  # with which its decoder does not repeat one token
built: dict[str, Any] = {}  # the model of a type that was built last


def build(model_type: str, folder: Path) -> Any:
    """Write a model with a tokenizer of the characters that processors write."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(SEEDS.get(model_type, 7))
    config = AutoConfig.for_model(model_type, **CONFIGS[model_type])
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if not parameter.any():  # Gemma 3's projection: with zeros all images would be equal
            torch.nn.init.normal_(parameter, std=1.0)
    built[model_type] = save(model, folder, (IMAGE, VIDEO, START, END))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSORS[model_type]))
    if model_type == "qwen3_vl":  # its limits are for all frames together
        limits = {"size": {"shortest_edge": SQUARE, "longest_edge": 24 * SQUARE}}
        (folder / "video_preprocessor_config.json").write_text(json.dumps(limits))
    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    assert len(characters) == FIRST_SPECIAL
    tokenizer = Tokenizer(models.BPE(vocab={one: number for number, one in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = SPECIAL_TOKENS["qwen" if model_type.startswith("qwen") else model_type]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.add_tokens([" seconds>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return built[model_type]


def joined(processed: list[Processed], name: str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([one.tensors[name] for one in processed]))


def qwen(model_type: str, ids: torch.Tensor, processed: list[Processed], *, video: bool = False) -> dict[str, Any]:
    built[model_type].model.rope_deltas = None  # those of the prompt before, which a text alone would use
    if not processed:
        return {}
    types = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    pixels, grid = joined(processed, "pixel_values"), joined(processed, "grid_thw")
    if not video:
        return {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": types}
    found = {"pixel_values_videos": pixels, "video_grid_thw": grid, "mm_token_type_ids": types}
    if model_type == "qwen2_5_vl":
        found["second_per_grid_ts"] = [one.seconds_per_frame for one in processed]
    return found


def gemma3(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    types = {"token_type_ids": (ids == IMAGE).int()}
    return {"pixel_values": joined(processed, "pixel_values"), **types} if processed else types


def tiles(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    del ids
    return {"pixel_values": joined(processed, next(iter(processed[0].tensors)))} if processed else {}


def tiles_of_a_prompt(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    """As `tiles`, for classes that take the tiles of several prompts."""
    return {name: pixels[None] for name, pixels in tiles(ids, processed).items()}


def colors(number: int) -> Image.Image:
    """16 fields of random colors, which shrunk pictures still show."""
    fields = np.random.default_rng(number).integers(0, 2, (4, 4, 3), dtype=np.uint8) * 255
    return Image.fromarray(fields).resize((64, 40) if number else (40, 64), Image.Resampling.NEAREST)


def clip(number: int) -> Video:
    """5 frames."""
    frames = np.stack([np.asarray(colors(number).resize((24, 32) if number else (24, 16)))] * 5).astype(np.int64)
    frames += np.arange(5)[:, None, None, None] * 40
    return Video((frames % 256).astype(np.uint8), np.arange(5) * (0.5 + number))


def short_clip(number: int) -> Video:
    """Its first 2 frames, for families in which each of them is an image."""
    whole = clip(number)
    return Video(whole.frames[:2], whole.times[:2])


def qwen_models(model_type: str) -> dict[str, MMModel]:
    make: Callable[[Path], Any] = partial(build, model_type)
    return {
        model_type: MMModel(make, partial(qwen, model_type), colors),
        f"{model_type}/video": MMModel(make, partial(qwen, model_type, video=True), clip, "video"),
    }


WHOLE = "the tokens of an image attend to each other"
MODELS: dict[str, MMModel] = {
    **qwen_models("qwen2_vl"),
    **qwen_models("qwen2_5_vl"),
    **qwen_models("qwen3_vl"),
    "gemma3": MMModel(partial(build, "gemma3"), gemma3, colors, whole=WHOLE),
    "gemma3/crops": MMModel(
        partial(build, "gemma3"),
        gemma3,
        colors,
        whole=WHOLE,
        options={"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16},
    ),
    "internvl": MMModel(partial(build, "internvl"), tiles, colors),
    "internvl/video": MMModel(partial(build, "internvl"), tiles, short_clip, "video"),
    "idefics3": MMModel(partial(build, "idefics3"), tiles_of_a_prompt, colors),
    "smolvlm": MMModel(partial(build, "smolvlm"), tiles_of_a_prompt, colors),
    "smolvlm/video": MMModel(partial(build, "smolvlm"), tiles_of_a_prompt, short_clip, "video"),
}
