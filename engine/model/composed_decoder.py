"""The decoder of a model with towers, in the form of a causal language model."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from engine.model import molmo
from engine.multimodal.families import MM_FAMILIES
from engine.pretrained import NO_REMOTE_CODE


def build_composite(config: Any, **options: Any) -> Any:
    """Build the class of a model with towers and a decoder; `options` are those of `from_config`."""
    from transformers import AutoModelForMultimodalLM

    if config.model_type == molmo.MODEL_TYPE:  # transformers has no class for it
        from engine.model.molmo import modeling

        modeling.register()
    return AutoModelForMultimodalLM.from_config(config, **options, **NO_REMOTE_CODE)


class ComposedDecoder(nn.Module):
    """The decoder and the head of transformers' class of a model that also takes images or audio.

    It has what causal language models have (`model`, `lm_head`, `config`, `base_model`), so that kernels and ranks see
    no difference. All its modules are those of the class.

    Args:
        whole: an instance of the class.
    """

    def __init__(self, whole: Any):
        super().__init__()
        self.model: Any = whole.get_decoder()
        self.lm_head: Any = whole.get_output_embeddings()
        self.config = whole.config.get_text_config(decoder=True)

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def get_decoder(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, *, logits_to_keep: Tensor, **arguments: Any) -> SimpleNamespace:
        """Logits [1, n, vocabulary] of the tokens `logits_to_keep`, int64[n]."""
        hidden = self.model(**arguments).last_hidden_state
        return SimpleNamespace(logits=self.lm_head(hidden[:, logits_to_keep]))


def decoder_of(model: Any) -> Any:
    """The decoder of a model with towers; any other model itself."""
    return ComposedDecoder(model) if model.config.model_type in MM_FAMILIES else model


def outer_modules(model: Any) -> Iterator[nn.Module]:
    """All modules of a model outside its decoder and its head: towers and what is around them."""
    others = {*decoder_of(model).modules()}
    return (module for module in model.modules() if module not in others)
