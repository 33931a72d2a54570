"""The tower of Molmo's first generation, and the attention that pools its patches. Names are the checkpoints'."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.model.molmo.configuration import MolmoConfig, MolmoVisionConfig


class Attention(nn.Module):
    """Attention without a mask. `inputs` is the width of queries, keys and values before their projections."""

    def __init__(self, config: MolmoVisionConfig, inputs: int):
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.wq = nn.Linear(inputs, width)
        self.wk = nn.Linear(inputs, width)
        self.wv = nn.Linear(inputs, width)
        self.wo = nn.Linear(width, width)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[batch, n, width] of queries [batch, n, inputs] and keys [batch, m, inputs]."""
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.wq(queries), self.wk(keys), self.wv(keys))
        )
        attended = functional.scaled_dot_product_attention(q, k, v)
        found: Tensor = self.wo(attended.transpose(1, 2).flatten(2))
        return found


class FeedForward(nn.Module):
    """The MLP of a layer of the tower, with CLIP's approximation of GELU."""

    def __init__(self, config: MolmoVisionConfig):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.w1(hidden)
        found: Tensor = self.w2(inner * torch.sigmoid(1.702 * inner))
        return found


class Block(nn.Module):
    """A layer of the tower."""

    def __init__(self, config: MolmoVisionConfig):
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.attention_norm(hidden)
        hidden = hidden + self.attention(normed, normed)
        found: Tensor = hidden + self.feed_forward(self.ffn_norm(hidden))
        return found


class VisionTransformer(nn.Module):
    """The tower, up to the last layer whose output is used."""

    def __init__(self, config: MolmoVisionConfig):
        super().__init__()
        self.layers = [layer % config.num_hidden_layers for layer in config.vit_layers]
        width = config.hidden_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + config.patches**2, width))
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, width, bias=False)
        self.pre_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([Block(config) for _ in range(1 + max(self.layers))])

    def forward(self, patches: Tensor) -> Tensor:
        """The joined outputs of the layers for the patches of crops: [crops, patches, layers · width].

        Args:
            patches: [crops, patches, pixels of a patch].
        """
        first = self.class_embedding.expand(len(patches), 1, -1)
        hidden = torch.cat([first, self.patch_embedding(patches)], 1) + self.positional_embedding
        hidden = self.pre_ln(hidden)
        outputs = []
        for block in self.transformer.resblocks:  # type: ignore[union-attr]
            hidden = block(hidden)
            outputs.append(hidden[:, 1:])
        return torch.cat([outputs[layer] for layer in self.layers], -1)


class ImageProjector(nn.Module):
    """From the width of the tower to that of the decoder."""

    def __init__(self, inputs: int, inner: int, outputs: int):
        super().__init__()
        self.w1 = nn.Linear(inputs, inner, bias=False)
        self.w2 = nn.Linear(inner, outputs, bias=False)
        self.w3 = nn.Linear(inputs, inner, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.w2(functional.silu(self.w1(hidden)) * self.w3(hidden))
        return found


class MolmoVisionBackbone(nn.Module):
    """From pixels to what is added to the embeddings of image tokens."""

    def __init__(self, config: MolmoConfig):
        super().__init__()
        vision = config.vision_config
        assert isinstance(vision, MolmoVisionConfig)
        self.config = vision
        joined = vision.hidden_size * len(vision.vit_layers)
        self.image_vit = VisionTransformer(vision)
        self.image_pooling_2d = Attention(vision, joined)
        self.image_projector = ImageProjector(vision.hidden_size, config.intermediate_size // 2, config.hidden_size)
        self.pad_embed = nn.Parameter(torch.zeros(2, joined))

    def forward(self, images: Tensor, image_masks: Tensor) -> Tensor:
        """[crops, pooled patches, hidden size of the decoder].

        Args:
            images: [crops, patches, pixels of a patch].
            image_masks: [crops, patches], the part of a patch that is image and not padding.
        """
        side, size = self.config.patches, self.config.pooling_size
        found = self.image_vit(images)
        all_pad = image_masks == 0
        partial_pad = (image_masks < 1) & ~all_pad
        for mask, embedding in zip((all_pad, partial_pad), self.pad_embed, strict=True):
            found = found + mask[..., None].to(found.dtype) * embedding
        grid = found.unflatten(1, (side, side))
        missing = -side % size
        grid = functional.pad(grid, (0, 0, 0, missing, 0, missing))
        # The patches that become one embedding, as a sequence of their own.
        windows = grid.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3)
        some = windows.flatten(3, 4).flatten(0, 2)
        pooled = self.image_pooling_2d(some.mean(1, keepdim=True), some)
        projected: Tensor = self.image_projector(pooled)
        return projected.view(len(images), -1, projected.shape[-1])
