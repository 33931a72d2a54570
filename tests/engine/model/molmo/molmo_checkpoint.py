"""Tiny checkpoints of Molmo's first generation, named like the published ones, and a plain forward pass of them."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "model_type": "molmo",
    "architectures": ["MolmoForCausalLM"],
    "auto_map": {"AutoConfig": "config_molmo.MolmoConfig", "AutoModelForCausalLM": "modeling_molmo.MolmoForCausalLM"},
    "attention_layer_norm": False,
    "clip_qkv": None,
    "embedding_size": 96,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-05,
    "layer_norm_type": "rms",
    "max_position_embeddings": 1024,
    "norm_after": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "qkv_bias": True,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_position_ids": True,
    "vocab_size": 96,
    "weight_tying": False,
    # Not in published files: the tower is always the same there.
    "additional_vocab_size": 16,
    "vision_config": {
        "image_size": 48,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vit_layers": [-2, -4],
    },
}
NORM_AFTER = {"norm_after": True, "attention_layer_norm": True, "qkv_bias": False}
PATCH, IMAGE = 98, 100  # ids of <im_patch> and <|image|> with this config


def config_of(**changes: Any) -> dict[str, Any]:
    return CONFIG | changes


def make_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 0.15) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["embedding_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    weights = {
        "model.transformer.wte.embedding": random(vocabulary, hidden),
        "model.transformer.wte.new_embedding": random(config["additional_vocab_size"], hidden),
        "model.transformer.ln_f.weight": 1 + random(hidden),
        "model.transformer.ff_out.weight": random(vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        block = f"model.transformer.blocks.{layer}."
        weights |= {
            f"{block}att_proj.weight": random(hidden + 2 * kv, hidden),
            f"{block}attn_out.weight": random(hidden, hidden),
            f"{block}ff_proj.weight": random(inner, hidden),
            f"{block}ff_out.weight": random(hidden, inner // 2),
            f"{block}attn_norm.weight": 1 + random(hidden),
            f"{block}ff_norm.weight": 1 + random(hidden),
        }
        if config["qkv_bias"]:
            weights[f"{block}att_proj.bias"] = random(hidden + 2 * kv)
        if config["attention_layer_norm"]:
            weights |= {f"{block}q_norm.weight": 1 + random(hidden), f"{block}k_norm.weight": 1 + random(kv)}
    return weights | _vision_weights(config, random)


def _vision_weights(config: dict[str, Any], random: Any) -> Weights:
    vision, hidden, inner = config["vision_config"], config["hidden_size"], config["intermediate_size"] // 2
    width, patches = vision["hidden_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    joined = width * len(vision["vit_layers"])
    base, vit = "model.vision_backbone.", "model.vision_backbone.image_vit."
    weights = {
        f"{base}pad_embed": random(2, joined),
        f"{base}image_projector.w1.weight": random(inner, width),
        f"{base}image_projector.w2.weight": random(hidden, inner),
        f"{base}image_projector.w3.weight": random(inner, width),
        f"{vit}class_embedding": random(width),
        f"{vit}positional_embedding": random(1 + patches, width),
        f"{vit}patch_embedding.weight": random(width, 3 * vision["patch_size"] ** 2),
        f"{vit}pre_ln.weight": 1 + random(width),
        f"{vit}pre_ln.bias": random(width),
    }
    attentions = {f"{base}image_pooling_2d.": joined}
    for layer in range(vision["num_hidden_layers"]):
        block = f"{vit}transformer.resblocks.{layer}."
        attentions[f"{block}attention."] = width
        weights |= {
            f"{block}feed_forward.w1.weight": random(vision["intermediate_size"], width),
            f"{block}feed_forward.w1.bias": random(vision["intermediate_size"]),
            f"{block}feed_forward.w2.weight": random(width, vision["intermediate_size"]),
            f"{block}feed_forward.w2.bias": random(width),
        }
        for norm in ("attention_norm", "ffn_norm"):
            weights |= {f"{block}{norm}.weight": 1 + random(width), f"{block}{norm}.bias": random(width)}
    for path, inputs in attentions.items():
        for name in ("wq", "wk", "wv", "wo"):
            weights |= {f"{path}{name}.weight": random(width, inputs if name != "wo" else width)}
            weights |= {f"{path}{name}.bias": random(width)}
    return weights


def write_checkpoint(folder: Path, config: dict[str, Any] = CONFIG, seed: int = 0) -> Weights:
    """Write config.json and model.safetensors; returns the weights."""
    weights = make_weights(config, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


class PlainMolmo:
    """The forward pass as the published code computes it, on one sequence, without a cache."""

    def __init__(self, config: dict[str, Any], weights: Weights):
        self.config, self.weights = config, weights

    def logits(self, tokens: list[int], images: list[dict[str, Tensor]] = []) -> Tensor:  # noqa: B006 - not changed
        """[tokens, vocabulary] for a prompt with the tensors of its images."""
        table = torch.cat([self.weights[f"model.transformer.wte.{name}embedding"] for name in ("", "new_")])
        x = table[torch.tensor(tokens)]
        patch = self.config["embedding_size"] + 2
        at = [position for position, token in enumerate(tokens) if token == patch]
        for position, feature in zip(at, [row for one in images for row in self.features(one)], strict=True):
            x[position] += feature
        for layer in range(self.config["num_hidden_layers"]):
            x = self._block(x, f"model.transformer.blocks.{layer}.")
        return self._rms(x, "model.transformer.ln_f.weight") @ self.weights["model.transformer.ff_out.weight"].T

    def greedy(self, tokens: list[int], images: list[dict[str, Tensor]], count: int) -> list[int]:
        """`count` output tokens."""
        found: list[int] = []
        for _ in range(count):
            found.append(int(self.logits([*tokens, *found], images)[-1].argmax()))
        return found

    def features(self, image: dict[str, Tensor]) -> Tensor:
        """What is added to the patch tokens of an image, in their order."""
        vision, base = self.config["vision_config"], "model.vision_backbone."
        x = self._vit(image["images"])
        mask = image["image_masks"]
        pad = self.weights[f"{base}pad_embed"]
        x = x + pad[0] * (mask == 0).float()[..., None] + pad[1] * ((mask < 1) & (mask != 0)).float()[..., None]
        side = vision["image_size"] // vision["patch_size"]
        pooled = []
        for crop in x.view(len(x), side, side, -1):
            for row in range(0, side, 2):
                for column in range(0, side, 2):
                    four = crop[row : row + 2, column : column + 2].flatten(0, 1)
                    pooled.append(self._attend(four.mean(0, keepdim=True), four, f"{base}image_pooling_2d.")[0])
        w1, w2, w3 = (self.weights[f"{base}image_projector.w{n}.weight"] for n in (1, 2, 3))
        y = torch.stack(pooled)
        return ((functional.silu(y @ w1.T) * (y @ w3.T)) @ w2.T)[image["image_order"]]

    def _vit(self, images: Tensor) -> Tensor:
        vision, vit = self.config["vision_config"], "model.vision_backbone.image_vit."
        found = []
        for crop in images:
            x = crop @ self.weights[f"{vit}patch_embedding.weight"].T
            x = torch.cat([self.weights[f"{vit}class_embedding"][None], x]) + self.weights[f"{vit}positional_embedding"]
            x = self._layer_norm(x, f"{vit}pre_ln.")
            outputs = []
            for layer in range(vision["num_hidden_layers"]):
                block = f"{vit}transformer.resblocks.{layer}."
                normed = self._layer_norm(x, f"{block}attention_norm.")
                x = x + self._attend(normed, normed, f"{block}attention.")
                y = self._linear(self._layer_norm(x, f"{block}ffn_norm."), f"{block}feed_forward.w1.")
                x = x + self._linear(y * torch.sigmoid(1.702 * y), f"{block}feed_forward.w2.")
                outputs.append(x)
            found.append(torch.cat([outputs[layer] for layer in vision["vit_layers"]], -1)[1:])
        return torch.stack(found)

    def _attend(self, queries: Tensor, keys: Tensor, path: str) -> Tensor:
        heads = self.config["vision_config"]["num_attention_heads"]
        q, k, v = (
            self._linear(x, f"{path}{name}.").unflatten(-1, (heads, -1)).transpose(0, 1)
            for x, name in ((queries, "wq"), (keys, "wk"), (keys, "wv"))
        )
        scores = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self._linear((scores @ v).transpose(0, 1).flatten(1), f"{path}wo.")

    def _block(self, x: Tensor, block: str) -> Tensor:
        config, after = self.config, self.config["norm_after"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        size = config["hidden_size"] // heads
        y = x if after else self._rms(x, f"{block}attn_norm.weight")
        joint = y @ self.weights[f"{block}att_proj.weight"].T
        if config["qkv_bias"]:
            joint = joint + self.weights[f"{block}att_proj.bias"]
        q, k, v = joint.split([heads * size, kv_heads * size, kv_heads * size], -1)
        if config["attention_layer_norm"]:
            q, k = self._rms(q, f"{block}q_norm.weight"), self._rms(k, f"{block}k_norm.weight")
        q, k, v = (one.unflatten(-1, (-1, size)).transpose(0, 1) for one in (q, k, v))
        q, k = self._rotate(q), self._rotate(k)
        k, v = (one.repeat_interleave(heads // kv_heads, 0) for one in (k, v))
        hidden = torch.full((len(x), len(x)), -torch.inf).triu(1)
        attended = ((q @ k.transpose(1, 2) / math.sqrt(size) + hidden).softmax(-1) @ v).transpose(0, 1).flatten(1)
        y = attended @ self.weights[f"{block}attn_out.weight"].T
        x = x + (self._rms(y, f"{block}attn_norm.weight") if after else y)
        y = x if after else self._rms(x, f"{block}ff_norm.weight")
        up, gate = (y @ self.weights[f"{block}ff_proj.weight"].T).chunk(2, -1)
        y = (functional.silu(gate) * up) @ self.weights[f"{block}ff_out.weight"].T
        return x + (self._rms(y, f"{block}ff_norm.weight") if after else y)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate the pairs (i, i + half) of heads [heads, tokens, size] by the positions."""
        half = x.shape[-1] // 2
        angles = torch.arange(x.shape[1])[:, None] * self.config["rope_theta"] ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    def _rms(self, x: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.config["layer_norm_eps"])
        return x * scale * self.weights[name]

    def _layer_norm(self, x: Tensor, path: str) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self.weights[f"{path}weight"], self.weights[f"{path}bias"], 1e-5)

    def _linear(self, x: Tensor, path: str) -> Tensor:
        return x @ self.weights[f"{path}weight"].T + self.weights[f"{path}bias"]
