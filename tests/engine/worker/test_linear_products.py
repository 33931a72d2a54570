"""Linears of transformers' classes whose weights are quantized on a device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine.model.linears import quantizable_linears
from engine.worker.linear_products import PLAIN, LinearFormats, PlainFormat, PlainProduct, Product, quantize_linears
from tests.engine.worker.driver import build_model


class Halved:
    """Implements `ProductFormat`: weights lose half of their value."""

    def refusal(self, outputs: int, inputs: int) -> str | None:
        return None if outputs < 100 else f"{outputs} outputs for {inputs} inputs"

    def make(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return PlainProduct(weight.clone() / 2, bias)


@pytest.mark.parametrize("tied", [True, False])
def test_linears_compute_by_their_products_and_lose_their_weights(tied: bool, tmp_path: Path) -> None:
    model: Any = build_model("qwen2", tmp_path, num_hidden_layers=2, tie_word_embeddings=tied)
    embedding = model.model.embed_tokens.weight.clone()
    expected = model.model.layers[0].mlp.down_proj.weight.clone() / 2
    linears, filled = quantizable_linears(model), list[nn.Module]()
    assert not isinstance(linears, str)
    quantize_linears(model, LinearFormats(Halved(), PlainFormat()), filled.append)
    assert filled == list(linears.values())
    assert {linear.weight.numel() for linear in linears.values()} == {0}
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    x = torch.randn(1, 3, 48)
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj(x), x @ expected.T)
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 128)


def test_the_plain_form_changes_nothing(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path, num_hidden_layers=2)
    filled: list[nn.Module] = []
    quantize_linears(model, PLAIN, filled.append)
    assert not filled
    assert PLAIN.refusal(model) is None


def test_a_refusal_names_the_linear(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path, num_hidden_layers=2)
    assert LinearFormats(Halved(), PlainFormat()).refusal(model) is None
    assert LinearFormats(Halved(), Halved()).refusal(model) == "lm_head: 128 outputs for 32 inputs"
