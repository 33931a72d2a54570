"""The decoder of a model that may also have encoders."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class TextPart:
    """A decoder with its head, under the names that a text-only class of transformers has.

    config: of the decoder. model: has `embed_tokens`, `layers`, `norm` and `rotary_emb`.
    """

    config: Any
    model: Any
    lm_head: Any


def text_part(model: Any) -> TextPart:
    """The decoder of a transformers model; of a text-only one the whole model."""
    decoder = model.get_decoder()
    return TextPart(decoder.config, decoder, model.get_output_embeddings())
