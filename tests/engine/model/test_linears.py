"""Which models can be quantized where transformers' class computes them."""

from pathlib import Path

import pytest

from engine.model.linears import quantizable_linears
from tests.engine.worker.driver import build_model


def test_all_linears_and_the_head(tmp_path: Path) -> None:
    found = quantizable_linears(build_model("granite", tmp_path, num_hidden_layers=1))
    layer = "model.layers.0."
    attention = [f"{layer}self_attn.{name}_proj" for name in "qkvo"]
    assert set(found) == {*attention, *(f"{layer}mlp.{name}_proj" for name in ("gate", "up", "down")), "lm_head"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mixtral", "its model.layers.0.mlp.gate.weight does not belong to a linear"),
        ("gpt2", "its transformer.h.0.attn.c_attn.weight does not belong to a linear"),
    ],
)
def test_models_with_other_large_parameters_are_refused(kind: str, reason: str, tmp_path: Path) -> None:
    model = build_model(kind, tmp_path)
    assert quantizable_linears(model) == reason
