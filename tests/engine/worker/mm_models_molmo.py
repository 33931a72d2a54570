"""Molmo's first generation, against a plain forward pass of the published code's arithmetic; and Molmo 2."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from engine.multimodal.types import Processed, Video
from tests.engine.model.molmo.molmo_checkpoint import CONFIG, NORM_AFTER, PlainMolmo, config_of, write_checkpoint
from tests.engine.worker.driver import VOCAB
from tests.engine.worker.mm_model import TEXT, MMModel, save

VISION = CONFIG["vision_config"] | {"image_size": 24}
MOLMO = {"vocab_size": VOCAB, "embedding_size": VOCAB, "vision_config": VISION}


def picture(number: int) -> Image.Image:
    """Each number is another picture; 1 and 2 have the same size, so that they can be exchanged."""
    width, height = ((40, 26), (25, 60))[(number + 1) // 2 % 2]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


class Reference:
    """`PlainMolmo` as the parity suite calls a class of transformers."""

    def __init__(self, plain: PlainMolmo):
        self._plain = plain

    def generate(self, input_ids: torch.Tensor, max_new_tokens: int, images: list[Any], **_: Any) -> torch.Tensor:
        prompt = input_ids[0].tolist()
        return torch.tensor([prompt + self._plain.greedy(prompt, images, max_new_tokens)])

    def __call__(self, input_ids: torch.Tensor, images: list[Any], **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self._plain.logits(input_ids[0].tolist(), images)[None])


def build(folder: Path, changes: dict[str, Any]) -> Reference:
    config = config_of(**MOLMO, **changes)
    weights = write_checkpoint(folder, config, seed=3)
    options = {"max_crops": 2, "overlap_margins": [2, 2]}
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    return Reference(PlainMolmo(config, weights))


def image_tensors(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    del ids
    each = [{name: torch.from_numpy(np.asarray(value)) for name, value in one.tensors.items()} for one in processed]
    return {"images": each}


MOLMO2_PATCH = VOCAB + 2
MOLMO2_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": [20, 20],
    "patch_size": 4,
    "initializer_range": 0.15,
}
MOLMO2_ADAPTER = {
    "vision_feature_layer": [2, 1],
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 48,
    "text_hidden_size": TEXT["hidden_size"],
    "initializer_range": 0.15,
}


def write_tokenizer(folder: Path) -> None:
    """Of printable characters and the token for a video."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    characters = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    tokenizer = Tokenizer(models.BPE(vocab={one: number for number, one in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken("<|video|>", normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))


def build_molmo2(folder: Path, changes: dict[str, Any]) -> Any:
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    torch.manual_seed(7)
    text = {**TEXT, "head_dim": 8, "additional_vocab_size": 16, "rope_parameters": {"rope_theta": 1e6}, **changes}
    config = Molmo2Config(
        text_config=text, vision_config=MOLMO2_VISION, adapter_config=MOLMO2_ADAPTER, image_patch_id=MOLMO2_PATCH,
        image_start_token_id=VOCAB, image_end_token_id=VOCAB + 1, low_res_image_start_token_id=VOCAB + 4,
        frame_start_token_id=VOCAB + 7, frame_end_token_id=VOCAB + 8,
    )  # fmt: skip
    options = {"size": {"height": 20, "width": 20}, "patch_size": 4, "max_crops": 2, "overlap_margins": [1, 1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    write_tokenizer(folder)
    return save(Molmo2ForConditionalGeneration._from_config(config, dtype=torch.float32), folder, ())


def molmo2_tensors(ids: torch.Tensor, processed: list[Processed]) -> dict[str, Any]:
    if not processed:
        return {}
    videos = not processed[0].tensors["image_grids"][0, 2]
    pooling, patches = [], 0
    for one in processed:
        own = one.tensors["image_token_pooling"]
        pooling.append(np.where(own < 0, own, own + patches))
        patches += one.tensors["pixel_values"].shape[0] * one.tensors["pixel_values"].shape[1]
    tensors = {
        name: np.concatenate([one.tensors[name] for one in processed]) for name in ("pixel_values", "image_grids")
    }
    tensors |= {"image_token_pooling": np.concatenate(pooling)}
    if videos:
        frames = [len(one.tensors["pixel_values"]) for one in processed]
        grids = [
            (count, rows // count, columns)
            for count, (rows, columns, *_) in zip(frames, tensors["image_grids"].tolist(), strict=True)
        ]
        return {
            "pixel_values_videos": torch.from_numpy(tensors["pixel_values"]),
            "video_token_pooling": torch.from_numpy(tensors["image_token_pooling"]),
            "video_grids": torch.tensor(grids),
            "mm_token_type_ids": (ids >= VOCAB).long(),
        }
    return {
        **{name: torch.from_numpy(value) for name, value in tensors.items()},
        "mm_token_type_ids": (ids >= VOCAB).long(),
    }


def clip(number: int) -> Video:
    """3 frames; the pooled squares of one have no patches of another."""
    frame = np.asarray(picture(number))
    return Video(np.stack([frame, 255 - frame, frame // 2]), np.arange(3) * (0.5 + number))


MODELS = {
    "molmo": MMModel(lambda folder: build(folder, {}), image_tensors, picture),
    "molmo/norm-after": MMModel(lambda folder: build(folder, NORM_AFTER), image_tensors, picture),
    "molmo2": MMModel(
        lambda folder: build_molmo2(folder, {}), molmo2_tensors, picture, whole="its tokens attend to each other"
    ),
    "molmo2/video": MMModel(
        lambda folder: build_molmo2(folder, {}), molmo2_tensors, clip, "video", "its tokens attend to each other"
    ),
    "molmo2/olmo": MMModel(
        lambda folder: build_molmo2(folder, {"qk_norm_type": "olmo", "norm_after": True}),
        molmo2_tensors,
        picture,
        whole="its tokens attend to each other",
    ),
}
