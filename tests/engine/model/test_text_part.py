"""The decoder of every class that has encoders is found, and has what the fused stacks pack."""

import pytest
import torch

from engine.model.text_part import text_part
from engine.worker.fused_stack import StackFormats, refusal
from tests.engine.composites import COMPOSITES, VOCAB, build_composite

FORMATS = StackFormats("float32", "float32", "float32")


@pytest.mark.parametrize("kind", COMPOSITES)
def test_the_decoder_of_a_model_with_encoders(kind: str) -> None:
    model = build_composite(kind)
    part = text_part(model)
    assert part.config is model.config.get_text_config(decoder=True)
    assert part.lm_head.weight.shape == part.model.embed_tokens.weight.shape == (VOCAB, 64)
    assert len(part.model.layers) == 3
    assert refusal(model, FORMATS, 16) is None
    ids = torch.arange(5)[None]
    whole = model(input_ids=ids).logits
    parts = part.lm_head(part.model(input_ids=ids).last_hidden_state)
    assert torch.equal(whole, parts)


def test_a_text_only_model_is_its_own_decoder() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, hidden_size=64, intermediate_size=48, vocab_size=32))
    part = text_part(model)
    assert (part.config, part.model, part.lm_head) == (model.config, model.model, model.lm_head)
