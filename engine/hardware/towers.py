"""Vision towers: their shapes, and how long they take for the images that a step encodes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.errors import ConfigError
from engine.hardware.description import Hardware
from engine.hardware.gemm import products_of

# CLIP ViT-L/14 with 336 pixels: 24 x 24 patches and the class token; the outputs of the last layer aren't used.
CLIP_PATCHES, CLIP_LAYERS, CLIP_HIDDEN, CLIP_INTERMEDIATE = 577, 23, 1024, 4096
MOLMO_CROPS = 12  # of an image, at most, besides the whole image
MOLMO_SIDE, MOLMO_STEP = 12, 8  # embeddings of a crop in each direction, and from one crop to the next


@dataclass(frozen=True, slots=True)
class TowerShape:
    """What the time of an image depends on.

    Args:
        layers: that are computed.
        hidden_size: numbers of a patch.
        intermediate_size: of the MLP; with `gated`, it has three products and not two.
        merged: patches of an embedding.
        crop: patches of a crop, in a tower of which all images have one size; 0: an image is one sequence.
        connector: products for each embedding after the tower, as numbers in and out.
        breaks: an image has a token after each row.
    """

    layers: int
    hidden_size: int
    intermediate_size: int
    gated: bool = False
    merged: int = 1
    crop: int = 0
    connector: tuple[tuple[int, int], ...] = ()
    breaks: bool = False

    def sequences(self, tokens: int) -> tuple[int, int]:
        """Of an image with so many tokens in the prompt: sequences of patches, and patches in each."""
        if self.crop:
            return (_molmo_crops(tokens) if self.merged > 1 else max(round(tokens / self.crop), 1)), self.crop
        embeddings = tokens - math.isqrt(tokens) if self.breaks else tokens
        return 1, max(embeddings, 1) * self.merged


def tower_shape(config: Mapping[str, Any]) -> TowerShape | None:
    """The tower of a model by the fields of its config.json; None of a model that takes texts only.

    Raises ConfigError for a model whose tower has no times.
    """
    family, vision = config.get("model_type", ""), config.get("vision_config") or {}
    text = (config.get("text_config") or config).get("hidden_size", 4096)
    if family == "molmo":
        inner = config["intermediate_size"] // 2
        pooling = ((2 * CLIP_HIDDEN, CLIP_HIDDEN), (CLIP_HIDDEN, inner), (CLIP_HIDDEN, inner), (inner, text))
        return TowerShape(CLIP_LAYERS, CLIP_HIDDEN, CLIP_INTERMEDIATE, merged=4, crop=CLIP_PATCHES, connector=pooling)
    kind = vision.get("model_type", "")
    if kind == "pixtral":
        hidden, merged = vision["hidden_size"], config.get("spatial_merge_size", 1) ** 2
        connector = (
            ((hidden * merged, hidden), (hidden, text), (text, text)) if merged > 1 else ((hidden, text), (text, text))
        )
        return TowerShape(
            vision["num_hidden_layers"], hidden, vision["intermediate_size"], gated=True, merged=merged,
            connector=connector, breaks=True,
        )  # fmt: skip
    if family == "qwen2_vl":
        hidden, merged = vision["embed_dim"], vision["spatial_merge_size"] ** 2
        connector = ((hidden * merged, hidden * merged), (hidden * merged, text))
        return TowerShape(
            vision["depth"], hidden, vision["mlp_ratio"] * hidden, merged=merged, connector=connector
        )  # fmt: skip
    if family == "llava":
        hidden = vision.get("hidden_size", CLIP_HIDDEN)
        return TowerShape(
            vision.get("num_hidden_layers", CLIP_LAYERS + 1) + min(config.get("vision_feature_layer", -2), -1) + 1,
            hidden, vision.get("intermediate_size", CLIP_INTERMEDIATE),
            crop=clip_patches(vision) + 1, connector=((hidden, text), (text, text)),
        )  # fmt: skip
    if "vision_config" in config or "audio_config" in config:
        raise ConfigError(
            f"the latency model has no times for the inputs of {family or 'this model'}: it knows the vision towers of "
            "Pixtral, Qwen2-VL, LLaVA 1.5 and Molmo"
        )
    return None


def clip_patches(vision: Mapping[str, Any]) -> int:
    """Patches of an image in a tower of one size, by the fields of its config."""
    return (vision.get("image_size", 336) // vision.get("patch_size", 14)) ** 2


class TowerTime:
    """Times of images; each rank encodes all of them, for towers aren't divided. Raises ConfigError without any."""

    def __init__(self, hardware: Hardware, shape: TowerShape):
        if hardware.attention.tower is None:
            raise ConfigError(f"{hardware.title} has no times of vision towers: its description lacks attention.tower")
        self.shape = shape
        self._hardware, self._attention = hardware, hardware.attention.tower
        self._products = products_of(hardware, "bf16")
        self._by_tokens: dict[int, float] = {}

    def seconds(self, tokens: int) -> float:
        """Of an image with so many tokens in the prompt."""
        if (known := self._by_tokens.get(tokens)) is not None:
            return known
        shape, layer = self.shape, self._hardware.layer
        count, patches = shape.sequences(tokens)
        all_patches, hidden, inner = count * patches, shape.hidden_size, shape.intermediate_size
        products = ((hidden, 3 * hidden), (hidden, hidden), (hidden, inner * (1 + shape.gated)), (inner, hidden))
        one = sum(self._products.seconds(all_patches, k, n) for k, n in products)
        one += 4 * all_patches * patches * hidden / self._attention_rate(patches)
        numbers = 10 * hidden + (1 + shape.gated) * inner
        one += 2 * all_patches * numbers / (layer.small_kernels_memory * self._hardware.bandwidth)
        one = max(one + layer.small_kernels_us * 1e-6, layer.eager_us * 1e-6)  # towers are not captured
        embeddings = max(all_patches // shape.merged, 1)
        seconds = shape.layers * one + sum(self._products.seconds(embeddings, k, n) for k, n in shape.connector)
        self._by_tokens[tokens] = seconds
        return seconds

    def _attention_rate(self, patches: int) -> float:
        """Operations a second, by the patches that attend to each other."""
        table = self._attention
        part = float(np.interp(math.log(patches), np.log(table.patches), table.compute))
        return part * self._hardware.peak_tflops.bf16 * 1e12


def _molmo_crops(tokens: int) -> int:
    """Crops of an image of Molmo, the whole image among them; 2 off where ways to cut it have the same tokens."""
    tilings = [(i, j) for i in range(1, MOLMO_CROPS + 1) for j in range(1, MOLMO_CROPS // i + 1)]
    rows, columns = min(tilings, key=lambda one: abs(molmo_tokens(*one) - tokens))
    return 1 + rows * columns


def molmo_tokens(rows: int, columns: int) -> int:
    """Tokens of an image that is cut into rows x columns crops: of the whole image, and of the crops."""
    margin = MOLMO_SIDE - MOLMO_STEP
    whole = 2 + MOLMO_SIDE * (MOLMO_SIDE + 1)
    return whole + 2 + (MOLMO_STEP * rows + margin) * (MOLMO_STEP * columns + margin + 1)
