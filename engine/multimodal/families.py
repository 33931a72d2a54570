"""The model families that take images, audio or video: what front ends, memory planning and workers must know of them.

Processors (`engine/multimodal/processors/`) and encoders (`engine/model/encoders/`) are found by the names here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from engine.multimodal.types import MediaKind

# A field of configs in Mistral's own format: mistral-common processes their images.
MISTRAL_IMAGES = "mistral_images"


@dataclass(frozen=True, slots=True)
class MMFamily:
    """A family of multimodal models.

    Args:
        placeholders: by kind, the field of config.json with the id of the token that stands for an input in the prompt;
            "FIELD+3" stands for the third token after it.
        processor: module in `engine.multimodal.processors`, which has `make(folder, hf_config) -> Processor`.
        encoder: module in `engine.model.encoders`, which has `make(model) -> Encoder`.
        embedding_ids: fields of config.json with the ids of the tokens that stand for an embedding within the tokens of
            an input; empty: those of `placeholders`.
        bidirectional: kinds whose placeholders attend to each other, so that an input is computed in one step.
        joint: fields with the ids of the tokens of an input that attend to each other, markers included, and to those
            of other inputs. All are computed in one step, and prompts that begin with the same input and go on with
            another share none. Empty: each input attends to itself only.
        alone: the kind of which a prompt has one input, and then no other.
        mrope: rotary positions have three sections (time, height, width).
        deepstack: the encoder also returns features that are added to the hidden states after the first layers.
        written: by kind, the text of that token, where only the tokenizer has its id. A model whose tokenizer lacks the
            token doesn't take the kind.
        added: its embeddings are added to those of their tokens, in place of which other families put them.
    """

    placeholders: dict[MediaKind, str]
    processor: str
    encoder: str
    embedding_ids: tuple[str, ...] = ()
    bidirectional: tuple[MediaKind, ...] = ()
    joint: tuple[str, ...] = ()
    alone: MediaKind | None = None
    mrope: bool = False
    deepstack: bool = False
    added: bool = False
    written: dict[MediaKind, str] = field(default_factory=dict)

    @property
    def kinds(self) -> list[MediaKind]:
        """All kinds, also those that some of its tokenizers lack the token for."""
        return [*self.placeholders, *self.written]


# Frames of a video that an encoder of images takes at once.
FRAMES_AT_ONCE = 8
# Patches of a video that the encoder of a Qwen-VL model takes at once, if a frame doesn't have more.
PATCHES_AT_ONCE = 4096
QWEN_VL: dict[MediaKind, str] = {"image": "image_token_id", "video": "video_token_id"}

# By model type in config.json.
MM_FAMILIES: dict[str, MMFamily] = {
    "llava": MMFamily({"image": "image_token_index"}, "llava", "llava"),  # also Pixtral, by the type of its tower
    "llava_next": MMFamily({"image": "image_token_index"}, "llava_next", "llava_next"),
    "llava_onevision": MMFamily(
        {"image": "image_token_index", "video": "video_token_index"}, "llava_onevision", "llava_onevision"
    ),
    "mistral3": MMFamily({"image": "image_token_index"}, "pixtral", "mistral3"),
    "qwen2_audio": MMFamily({"audio": "audio_token_index"}, "qwen2_audio", "qwen2_audio"),
    "voxtral": MMFamily({"audio": "audio_token_id"}, "voxtral", "voxtral"),
    "qwen2_vl": MMFamily(QWEN_VL, "qwen2_vl", "qwen2_vl", mrope=True),
    "qwen2_5_vl": MMFamily(QWEN_VL, "qwen2_vl", "qwen2_vl", mrope=True),
    "qwen3_vl": MMFamily(QWEN_VL, "qwen3_vl", "qwen3_vl", mrope=True, deepstack=True),
    "gemma3": MMFamily(
        {"image": "boi_token_index"},
        "gemma3",
        "gemma3",
        embedding_ids=("image_token_index",),
        bidirectional=("image",),
    ),
    "internvl": MMFamily(
        {"image": "image_token_id"},
        "internvl",
        "internvl",
        embedding_ids=("image_token_id",),
        written={"video": "<video>"},
    ),
    "molmo": MMFamily({"image": "embedding_size+4"}, "molmo", "molmo", embedding_ids=("embedding_size+2",), added=True),
    "molmo2": MMFamily(
        {"image": "image_patch_id+3"},
        "molmo2",
        "molmo2",
        embedding_ids=("image_patch_id",),
        bidirectional=("image", "video"),
        joint=(
            "image_patch_id",
            "image_patch_id+1",  # the end of a row
            "image_start_token_id",
            "low_res_image_start_token_id",
            "image_end_token_id",
            "frame_start_token_id",
            "frame_end_token_id",
        ),
        alone="video",
        added=True,
        written={"video": "<|video|>"},
    ),
    "idefics3": MMFamily({"image": "image_token_id"}, "idefics3", "idefics3"),
    "smolvlm": MMFamily(
        {"image": "image_token_id"},
        "smolvlm",
        "idefics3",
        embedding_ids=("image_token_id",),
        written={"video": "<video>"},
    ),
}


def placeholder_ids(
    family: MMFamily, hf_config: Any, added: Mapping[str, int] = MappingProxyType({})
) -> dict[MediaKind, int]:
    """By kind, the token that stands for an input in a prompt; `added`: the tokenizer's added tokens by text."""
    found = {kind: _token_id(hf_config, name) for kind, name in family.placeholders.items()}
    return found | {kind: added[text] for kind, text in family.written.items() if text in added}


def embedding_ids(family: MMFamily, hf_config: Any) -> frozenset[int]:
    """The tokens that stand for an embedding within the tokens of an input."""
    fields = family.embedding_ids or tuple(family.placeholders.values())
    return frozenset(_token_id(hf_config, name) for name in fields)


def joint_ids(family: MMFamily, hf_config: Any) -> frozenset[int]:
    """The tokens of inputs that attend to each other and to those of other inputs."""
    return frozenset(_token_id(hf_config, name) for name in family.joint)


def _token_id(hf_config: Any, field: str) -> int:
    name, _, after = field.partition("+")
    return int(getattr(hf_config, name)) + int(after or 0)


def declared_placeholders(config: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that stand for an input, as far as the fields of a config.json name them."""
    family = MM_FAMILIES.get(config.get("model_type", ""))
    found = set()
    for declared in family.placeholders.values() if family is not None else ():
        name, _, after = declared.partition("+")
        if isinstance(config.get(name), int):
            found.add(config[name] + int(after or 0))
    return frozenset(found)
