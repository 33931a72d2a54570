"""Adapters in the fused stack: what a merged model computes, for the tokens that have them and for no others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ModelError
from engine.kernels.cpu.bindings import PackedAdapter
from engine.model.lora.lora_packing import by_layer, pack_adapter
from engine.model.lora.lora_weights import Adapter, LowRank
from tests.engine.kernels.cpu.test_stack import (  # the fixture works by being here
    FORMS,
    ISAS,
    Served,
    Shape,
    round_weights,
    software_tiles,  # noqa: F401
)
from tests.perf.cpu_stack import batch_of

SHAPE = Shape("qwen3", 64, 2, 2, 64, 128, 100, None)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU kernels need AVX2 or NEON")


def draw(seed: int, ranks: dict[str, int]) -> list[dict[str, LowRank]]:
    """An adapter of SHAPE that adds to the linears named, large enough to be seen."""
    made = torch.Generator().manual_seed(seed)
    model = SHAPE.build(torch.float32)
    layers = []
    for layer in model.model.layers:
        named = {name.rsplit(".", 1)[-1]: module for name, module in layer.named_modules()}
        layers.append({
            name: LowRank(
                torch.randn(rank, named[name].in_features, generator=made),
                torch.randn(named[name].out_features, rank, generator=made) * 0.05,
            )
            for name, rank in ranks.items()
        })  # fmt: skip
    return layers


def logits(
    served: Served, prompts: list[np.ndarray], adapters: list[PackedAdapter], of: list[int], cut: int = 0
) -> np.ndarray:
    """Of the last token of each prompt, whose adapter is of[i]; computed in two chunks where `cut` is given."""
    first, rows = 1, []
    for prompt in prompts:
        blocks = served.blocks_for(len(prompt), first)
        first += len(blocks)
        rows.append((prompt, 0, blocks))
    if cut:
        run(served, [(ids[:cut], 0, blocks) for ids, _, blocks in rows], adapters, of)
        rows = [(ids[cut:], cut, blocks) for ids, _, blocks in rows]
    return run(served, rows, adapters, of)


def run(served: Served, rows: list, adapters: list[PackedAdapter], of: list[int]) -> np.ndarray:
    batch = batch_of(rows)
    served.stack.begin(batch, adapters, np.array(of, dtype=np.int32)[batch.row_of])
    served.stack.run(0, served.stack.last_part)
    out = np.empty((len(rows), served.vocabulary), dtype=np.float32)
    served.stack.logits(np.arange(len(rows), dtype=np.int32), out)
    return out


def merged(adapter: list[dict[str, LowRank]], ids: np.ndarray, rounded: str = "") -> np.ndarray:
    """What transformers computes with the adapter added to the weights, which may be rounded before."""
    model = SHAPE.build(torch.bfloat16).float() if rounded else SHAPE.build(torch.float32)
    if rounded:
        round_weights(model, rounded)
    for layer, parts in zip(model.model.layers, adapter, strict=True):
        for name, module in layer.named_modules():
            part = parts.get(name.rsplit(".", 1)[-1])
            if part is not None:
                module.weight += part.up @ part.down
    with torch.inference_mode():
        return model(torch.from_numpy(ids)[None]).logits[0, -1].numpy()


ranks = st.dictionaries(st.sampled_from(LINEARS), st.integers(1, 9), min_size=1)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=8, deadline=None)
@given(first=ranks, second=ranks, lengths=st.lists(st.integers(2, 60), min_size=3, max_size=5))
def test_a_batch_computes_what_merged_weights_do(
    isa: str, first: dict[str, int], second: dict[str, int], lengths: list[int]
) -> None:
    served = Served(SHAPE, torch.float32, 32, isa)
    adapters = [draw(1, first), draw(2, second)]
    packed = [pack_adapter(one, served.stack._spec) for one in adapters]
    prompts = [np.random.default_rng(n).integers(0, 100, n) for n in lengths]
    of = [i % 3 - 1 for i in range(len(prompts))]
    found = logits(served, prompts, packed, of)
    for row, ids, which in zip(found, prompts, of, strict=True):
        expected = merged(adapters[which] if which >= 0 else [{}, {}], ids)
        np.testing.assert_allclose(row, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
def test_the_same_bits_alone_in_a_batch_and_in_chunks(isa: str, form: str) -> None:
    dtype, weights, cache = FORMS[form]
    served = Served(SHAPE, dtype, 32, isa, weights=weights, cache=cache)
    packed = [pack_adapter(draw(i, dict.fromkeys(LINEARS, 4 + i)), served.stack._spec) for i in range(2)]
    prompts = [np.random.default_rng(n).integers(0, 100, n) for n in (40, 57, 33)]
    of = [1, -1, 0]
    together = logits(served, prompts, packed, of)
    chunked = logits(served, prompts, packed, of, cut=17)
    assert (together == chunked).all()
    for i, ids in enumerate(prompts):
        assert (logits(served, [ids], packed, of[i : i + 1])[0] == together[i]).all()
    plain = logits(served, prompts, [], [-1] * 3)
    assert (plain[1] == together[1]).all(), "who has none is computed as if nobody had"
    assert (plain[[0, 2]] != together[[0, 2]]).any(1).all()


@pytest.mark.parametrize(("form", "most"), [("int8", 0.06), ("int4", 0.09)])
@pytest.mark.parametrize("isa", ISAS)
def test_quantized_weights_take_the_same_addition(isa: str, form: str, most: float) -> None:
    """Against transformers with the rounded weights: what is left is the rounding of activations, keys and values."""
    adapter = draw(3, dict.fromkeys(LINEARS, 8))
    ids = np.random.default_rng(1).integers(0, 100, 50)
    dtype, weights, cache = FORMS[form]
    served = Served(SHAPE, dtype, 32, isa, weights=weights, cache=cache)
    found = logits(served, [ids], [pack_adapter(adapter, served.stack._spec)], [0])[0]
    expected = merged(adapter, ids, weights)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < most


@pytest.mark.parametrize(
    ("down", "up", "name", "complaint"),
    [
        ((2, 64), (64, 2), "o_porj", "changes 'o_porj' in layer 0, but the model has q_proj"),
        ((2, 64), (64, 2), "o_proj", r"weights of o_proj in layer 0 have shapes \(2, 64\).*needs \(2, 256\)"),
        ((2, 64), (1, 2), "q_proj", r"\(1, 2\).*needs \(2, 64\) and \(256, 2\)"),
        ((2, 64), (256, 3), "q_proj", r"\(256, 3\)"),
    ],
)
def test_what_does_not_fit_the_model_is_named(
    down: tuple[int, int], up: tuple[int, int], name: str, complaint: str
) -> None:
    spec = Served(SHAPE, torch.float32, 32, ISAS[0]).stack._spec
    with pytest.raises(ModelError, match=complaint):
        pack_adapter([{name: LowRank(torch.ones(down), torch.ones(up))}, {}], spec)
    with pytest.raises(ModelError, match="1 layers, the model 2"):
        pack_adapter([{}], spec)


def test_an_adapter_that_is_not_there_is_refused() -> None:
    served = Served(SHAPE, torch.float32, 32, ISAS[0])
    ids = np.arange(5)
    packed = pack_adapter(draw(1, {"q_proj": 2}), served.stack._spec)
    with pytest.raises(ValueError, match="adapter 1 of 1"):
        logits(served, [ids], [packed], [1])
    other = PackedAdapter((type(packed.linears)._type_ * 4)(), 0, None)
    with pytest.raises(ValueError, match="another model"):
        logits(served, [ids], [other], [0])


@pytest.mark.parametrize("decoder", ["", "language_model.", "text_model."])
def test_the_layers_of_a_decoder_among_encoders(decoder: str) -> None:
    part = LowRank(torch.zeros(2, 4), torch.zeros(4, 2))
    found = by_layer(Adapter({f"model.{decoder}layers.1.mlp.up_proj": part}), range(2))
    assert found == [{}, {"up_proj": part}]
    assert by_layer(Adapter({f"model.{decoder}layers.1.mlp.up_proj": part}), range(1, 3)) == [{"up_proj": part}, {}]
    with pytest.raises(ModelError, match=r"vision_tower.*--kernels torch does"):
        by_layer(Adapter({"model.vision_tower.layers.1.mlp.up_proj": part}), range(2))
