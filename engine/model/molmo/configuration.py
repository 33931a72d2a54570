"""The config of Molmo's first generation; its fields are those of the checkpoints' config.json."""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from engine.model.molmo import MODEL_TYPE

# The checkpoints' new tokens, in the order of their ids, which follow those of the vocabulary.
IMAGE_START, IMAGE_END, IMAGE_PATCH, IMAGE_COLUMN, IMAGE = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<|image|>",
)
NEW_TOKENS = (IMAGE_START, IMAGE_END, IMAGE_PATCH, IMAGE_COLUMN, IMAGE)


class MolmoVisionConfig(PreTrainedConfig):
    """The tower (CLIP ViT-L/14 with 336 pixels) and what joins its patches; config.json has none of it.

    Args:
        vit_layers: outputs of these layers are joined, counted from the end of `num_hidden_layers`.
        pooling_size: patches per embedding, in each direction.
    """

    model_type = "molmo_vision"
    base_config_key = "vision_config"

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-5
    vit_layers: list[int] | tuple[int, ...] = (-2, -9)
    pooling_size: int = 2
    initializer_range: float = 0.02

    @property
    def patches(self) -> int:
        """Patches of a crop, in each direction."""
        return self.image_size // self.patch_size

    @property
    def pooled(self) -> int:
        """Embeddings of a crop, in each direction."""
        return -(-self.patches // self.pooling_size)


class MolmoConfig(PreTrainedConfig):
    """The decoder is Qwen2's, or with `norm_after` that of OLMo 2. Raises ValueError for any other.

    Args:
        intermediate_size: of gate and up together.
        embedding_size: tokens of the vocabulary with their padding; `additional_vocab_size` new ones follow.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
        "vision_config": SubConfigSpec(config_class=MolmoVisionConfig),
    }

    vocab_size: int = 152_064
    embedding_size: int | None = None
    additional_vocab_size: int = 128
    hidden_size: int = 3584
    intermediate_size: int = 37_888
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096
    layer_norm_eps: float = 1e-5
    layer_norm_type: str = "rms"
    rope_theta: float = 10_000.0
    clip_qkv: float | None = None
    qkv_bias: bool = False
    attention_layer_norm: bool = False
    norm_after: bool = False
    weight_tying: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vision_config: dict[str, Any] | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.text_config is None:
            self.text_config = self._text_fields()
        super().__post_init__(**kwargs)

    def _text_fields(self) -> dict[str, Any]:
        self._check()
        fields: dict[str, Any] = {
            "vocab_size": self.embedding_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size // 2,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads or self.num_attention_heads,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.layer_norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "tie_word_embeddings": False,
            "initializer_range": self.initializer_range,
            "additional_vocab_size": self.additional_vocab_size,
        }
        return fields | {"model_type": "olmo2" if self.norm_after else "qwen2"}

    def _check(self) -> None:
        for name, value, wanted in (
            ("layer_norm_type", self.layer_norm_type, "rms"),
            ("clip_qkv", self.clip_qkv, None),
            ("weight_tying", self.weight_tying or self.tie_word_embeddings, False),
            # OLMo 2 normalizes queries and keys and has no bias there; Qwen2 has a bias and doesn't normalize.
            ("attention_layer_norm", self.attention_layer_norm, self.norm_after),
            ("qkv_bias", self.qkv_bias, not self.norm_after),
        ):
            if value != wanted:
                raise ValueError(f"{name} {value!r} isn't supported for models of type {MODEL_TYPE!r}, only {wanted!r}")

    @property
    def first_new_token(self) -> int:
        assert self.embedding_size is not None
        return self.embedding_size

    @property
    def new_tokens(self) -> dict[str, int]:
        return {token: self.first_new_token + number for number, token in enumerate(NEW_TOKENS)}

    @property
    def image_patch_token_id(self) -> int:
        return self.new_tokens[IMAGE_PATCH]

    @property
    def image_token_id(self) -> int:
        """The token that stands for an image in a prompt."""
        return self.new_tokens[IMAGE]


def register() -> None:
    """Make the config known to transformers' AutoConfig."""
    AutoConfig.register(MODEL_TYPE, MolmoConfig, exist_ok=True)
