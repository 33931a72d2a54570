"""The decoder of every class that has towers computes what the class computes, and fits the fused stacks."""

import pytest
import torch

from engine.model.composed_decoder import ComposedDecoder, decoder_of
from engine.model.rotary_axes import rotary_axes, sections, uses_mrope
from engine.worker import fused_stack, triton_stack
from engine.worker.fused_stack import StackFormats
from tests.engine.composites import COMPOSITES, VOCAB, build_composite

FORMATS = StackFormats("float32", "float32", "float32")
MROPE = {"rope_type": "default", "rope_theta": 1e4}


@pytest.mark.parametrize("kind", COMPOSITES)
def test_the_decoder_of_a_model_with_towers(kind: str) -> None:
    model = build_composite(kind)
    part = decoder_of(model)
    assert isinstance(part, ComposedDecoder)
    assert part.config is model.config.get_text_config(decoder=True)
    assert part.lm_head.weight.shape == part.model.embed_tokens.weight.shape == (VOCAB, 64)
    assert fused_stack.refusal(part, FORMATS, 16) is None
    assert triton_stack.refusal(part) is None
    assert uses_mrope(part) == ("qwen" in kind)
    ids = torch.arange(5)[None]
    whole = model(input_ids=ids).logits
    torch.testing.assert_close(part(input_ids=ids, logits_to_keep=torch.tensor([3, 4])).logits, whole[:, 3:])


@pytest.mark.parametrize(
    ("kind", "given", "axes", "in_turns"),
    [
        ("qwen2_vl", [4, 2, 2], [0, 0, 0, 0, 1, 1, 2, 2], False),
        ("qwen2_5_vl", [2, 3, 3], [0, 0, 1, 1, 1, 2, 2, 2], False),
        ("qwen3_vl", [4, 2, 2], [0, 1, 2, 0, 1, 2, 0, 0], True),
    ],
)
def test_axes_of_rotary_positions(kind: str, given: list[int], axes: list[int], in_turns: bool) -> None:
    decoder = decoder_of(build_composite(kind, rope_parameters={**MROPE, "mrope_section": given}))
    found = rotary_axes(decoder.model.rotary_emb)
    assert found.tolist() == axes
    assert sections(found) == (tuple(given), in_turns)


def test_an_arrangement_of_axes_that_kernels_do_not_have() -> None:
    assert sections(torch.tensor([2, 0, 1, 0], dtype=torch.int32)) is None
    plain = decoder_of(build_composite("llava")).model.rotary_emb
    assert rotary_axes(plain).tolist() == [0] * 8
