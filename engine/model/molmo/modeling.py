"""The class of Molmo's first generation, in the form of transformers' classes.

The decoder is transformers' own. Parameters of the checkpoint that hold several of its parameters are divided while
they are read.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForMultimodalLM, GenerationMixin, Olmo2Model, PreTrainedModel, Qwen2Model
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, Concatenate, Split, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from engine.model.molmo import MODEL_TYPE
from engine.model.molmo.configuration import MolmoConfig
from engine.model.molmo.vision import MolmoVisionBackbone, VisionTransformer


class MolmoDecoder(Qwen2Model):
    """The decoder of most checkpoints, with embeddings for the new tokens."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size + config.additional_vocab_size, config.hidden_size)
        self.post_init()


class MolmoNormAfterDecoder(Olmo2Model):
    """The decoder of checkpoints with `norm_after`."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size + config.additional_vocab_size, config.hidden_size)
        self.post_init()


class MolmoPreTrainedModel(PreTrainedModel):
    """What both classes share. Layers of the tower that nothing uses are not loaded."""

    config: MolmoConfig
    config_class = MolmoConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_attention_backend = True
    _keys_to_ignore_on_load_unexpected = [r"image_vit\.transformer\.resblocks\.\d+\."]  # noqa: RUF012 - as in transformers

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionTransformer):
            module.class_embedding.data.normal_(std=std)
            module.positional_embedding.data.normal_(std=std)
        elif isinstance(module, MolmoVisionBackbone):
            module.pad_embed.data.normal_(std=std)


class MolmoModel(MolmoPreTrainedModel):
    """The tower and the decoder, without the head."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        text: Any = config.text_config
        decoder = MolmoNormAfterDecoder if text.model_type == "olmo2" else MolmoDecoder
        self.vision_backbone = MolmoVisionBackbone(config)
        self.language_model = decoder(text)
        self.post_init()

    def get_image_features(self, images: Tensor, image_masks: Tensor, image_order: Tensor) -> Tensor:
        """What is added to the embeddings of the patch tokens of one image, or of several, in their order.

        Args:
            images, image_masks: see `MolmoVisionBackbone.forward`.
            image_order: int64[n], for each token its number among the pooled patches of all crops.
        """
        dtype = self.vision_backbone.pad_embed.dtype
        found: Tensor = self.vision_backbone(images.to(dtype), image_masks).flatten(0, 1)
        return found[image_order]

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_order: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if images is not None and image_masks is not None and image_order is not None:
                features = self.get_image_features(images, image_masks, image_order)
                at = input_ids == self.config.image_patch_token_id
                inputs_embeds = inputs_embeds.index_put((at,), features.to(inputs_embeds.dtype), accumulate=True)
        found: BaseModelOutputWithPast = self.language_model(inputs_embeds=inputs_embeds, **options)
        return found


class MolmoForConditionalGeneration(MolmoPreTrainedModel, GenerationMixin):
    """The whole model. Its head has no rows for the new tokens, so that they are never sampled."""

    def __init__(self, config: MolmoConfig):
        super().__init__(config)
        self.model = MolmoModel(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        images: Tensor | None = None,
        image_masks: Tensor | None = None,
        image_order: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        found = self.model(
            input_ids, images, image_masks, image_order, inputs_embeds, attention_mask=attention_mask, **options
        )
        hidden = found.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.lm_head(hidden[:, kept]), past_key_values=found.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """Images are needed in the first step only."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if not kwargs.get("is_first_iteration", False) and kwargs.get("use_cache", True):
            for name in ("images", "image_masks", "image_order"):
                inputs.pop(name, None)
        return inputs


Conversions = list[WeightConverter | WeightRenaming]

ROOT = {
    r"(?<!image_vit\.)transformer\.blocks\.": "language_model.layers.",
    r"(?<!image_vit\.)transformer\.ln_f\.": "language_model.norm.",
    r"(?<!image_vit\.)transformer\.wte\.": "language_model.wte.",
    r"model\.transformer\.ff_out\.": "lm_head.",
}
LAYER = {
    r"\.attn_out\.": ".self_attn.o_proj.",
    r"\.ff_out\.": ".mlp.down_proj.",
    r"\.q_norm\.": ".self_attn.q_norm.",
    r"\.k_norm\.": ".self_attn.k_norm.",
}
NORMS = {r"\.attn_norm\.": ".input_layernorm.", r"\.ff_norm\.": ".post_attention_layernorm."}
NORMS_AFTER = {r"\.attn_norm\.": ".post_attention_layernorm.", r"\.ff_norm\.": ".post_feedforward_layernorm."}


def decoder_conversions(norms: dict[str, str]) -> Conversions:
    """How the names and parameters of a checkpoint's decoder become those of transformers' class."""
    queries_keys_values = [f"self_attn.{kind}_proj" for kind in "qkv"]
    return [
        *(WeightRenaming(source, target) for source, target in (LAYER | norms).items()),
        WeightConverter("att_proj", queries_keys_values, operations=[Split(dim=0)]),
        # OLMo's SwiGLU has the gate in the second half.
        WeightConverter("ff_proj", ["mlp.up_proj", "mlp.gate_proj"], operations=[Chunk(dim=0)]),
        WeightConverter(["wte.embedding", "wte.new_embedding"], "embed_tokens.weight", operations=[Concatenate(dim=0)]),
    ]


def register() -> None:
    """Make the class and its conversions known to transformers."""
    AutoModelForMultimodalLM.register(MolmoConfig, MolmoForConditionalGeneration, exist_ok=True)
    root: Conversions = [WeightRenaming(source, target) for source, target in ROOT.items()]
    for name, conversions in (
        (MODEL_TYPE, root),
        (MolmoDecoder.__name__, decoder_conversions(NORMS)),
        (MolmoNormAfterDecoder.__name__, decoder_conversions(NORMS_AFTER)),
    ):
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)
