"""The fused stack against the generic path over random shapes, and against itself over random schedules."""

import ctypes
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.grammar import RowMasks
from engine.kernels.cpu import build
from engine.kernels.cpu.bindings import Stack
from engine.kernels.quantization import quantize
from engine.model.kv_groups import group_layers, layer_windows
from engine.worker import fused_stack
from engine.worker.fused_stack import StackFormats
from tests.perf.cpu_stack import batch_of

SOFTWARE = "amx-in-software"
ISAS = [*build.supported_isas(), SOFTWARE] if build.supported_isas() else []


@pytest.fixture(scope="module", autouse=True)
def software_tiles() -> Iterator[None]:
    """AMX's tiles in plain C++: what is built on them is tested wherever there is a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        flags, needs = build.ISAS[next(isa for isa in build.supported_isas() if isa != "amx")]
        patch.setitem(build.ISAS, SOFTWARE, ((*flags, "-DTILES_IN_SOFTWARE"), needs))
        yield


BLOCKS = 24
THREADS = 2

pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU kernels need AVX2 or NEON")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model to draw."""

    kind: str
    hidden: int
    kv_heads: int
    group: int
    head_dim: int
    intermediate: int
    vocabulary: int
    window: int | None
    tied: bool = False  # the embedding is the head

    def build(self, dtype: torch.dtype) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(
            self.kind, vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=2, num_attention_heads=self.kv_heads * self.group, num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim, max_position_embeddings=4096, initializer_range=0.15, sliding_window=self.window,
            tie_word_embeddings=self.tied, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.manual_seed(1)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)


sizes = st.integers(1, 6).map(lambda n: 16 * n)
shapes = st.builds(
    Shape, st.sampled_from(["mistral", "qwen3"]), sizes, st.integers(1, 3), st.sampled_from([1, 3, 5, 14]),
    st.sampled_from([16, 48, 64, 80, 128]), sizes, st.integers(33, 200), st.sampled_from([None, 1, 40]),
    st.booleans(),
)  # fmt: skip


def random_masks(random: np.random.Generator, rows: int, tokens: int) -> RowMasks:
    """For some of the rows, masks of a few tokens, of half of them or of all but one."""
    at = np.flatnonzero(random.random(rows) < 0.7)
    words = -(-(tokens + 1) // 32)
    bits = random.random((len(at), words * 32)) < random.choice([0.02, 0.5, 0.99], (len(at), 1))
    bits[np.arange(len(at)), random.integers(0, tokens, len(at))] = True
    return RowMasks(at, np.packbits(bits, axis=1, bitorder="little").view(np.int32))


class Served:
    """A stack, and the blocks of its cache in a random order."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        block_size: int,
        isa: str,
        blocks: int = BLOCKS,
        weights: str = "",
        cache: str = "",
    ):
        name = str(dtype).removeprefix("torch.")
        form = StackFormats(name, weights or name, cache or name)
        model = shape.build(dtype)
        groups = group_layers(layer_windows(model.config, model.config.max_position_embeddings))
        spec, owners = fused_stack.make_spec(model, form, blocks, block_size, groups, partial=False)
        self.stack = Stack(spec, form.weights, form.cache, THREADS, isa, owners)
        self.vocabulary = shape.vocabulary
        self.block_size = block_size

    def run(self, rows: list[tuple[NDArray[np.integer], int, list[int]]], every: bool = False) -> NDArray[np.float32]:
        """Compute rows of (token ids, tokens before them, blocks); logits of each row's last token, or of every one."""
        batch = batch_of(rows, every=every)
        self.stack.begin(batch)
        self.stack.run(0, self.stack.last_part)
        out = np.empty((len(batch.sampled), self.vocabulary), dtype=np.float32)
        every_one = np.arange(len(out), dtype=np.int32)
        self.stack.logits(every_one, out)
        self.check_choice(out)
        some = every_one[::-2].copy()
        part = np.empty((len(some), self.vocabulary), dtype=np.float32)
        self.stack.logits(some, part)
        assert (part == out[some]).all(), "whose logits are asked for doesn't change them"
        return out

    def check_choice(self, logits: NDArray[np.float32]) -> None:
        """The fused choice is that of the logits: the greedy token, or where the number falls in the running sum."""
        random = np.random.default_rng(len(logits))
        temperatures = random.choice(np.array([0, 1e-9, 0.3, 1, 30], dtype=np.float32), len(logits))
        numbers = random.choice([0.0, 0.5, np.nextafter(1.0, 0.0), random.random()], len(logits))
        for masks in (None, random_masks(random, *logits.shape)):
            allowed = logits.copy()
            for number, at in enumerate([] if masks is None else masks.at):
                assert masks is not None
                allowed[at, ~masks.accepted(number, logits.shape[1])] = -np.inf
            tokens = self.stack.choose(temperatures, numbers, masks)
            for token, row, temperature, number in zip(
                tokens, allowed.astype(float), temperatures, numbers, strict=True
            ):
                if temperature == 0:
                    assert token == row.argmax()
                    continue
                weights = np.exp((row - row.max()) / max(temperature, 1e-6))
                edges = weights.cumsum() / weights.sum()
                assert edges[token] - weights[token] / weights.sum() - 1e-5 <= number <= edges[token] + 1e-5
                assert weights[token] > 0
            assert (self.stack.choose(np.zeros_like(temperatures), numbers, masks) == allowed.argmax(1)).all()
            tops, greedy, _ = self.stack.greedy(temperatures, masks)
            assert (greedy == allowed.argmax(1)).all()
            assert (tops == allowed.max(1)).all()
            drawn = self.stack.draw(numbers)
            assert (drawn == tokens).all()

    def blocks_for(self, tokens: int, first: int) -> list[int]:
        return list(range(first, first + -(-tokens // self.block_size)))


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=25, deadline=None)
@given(shape=shapes, block_size=st.sampled_from([16, 32, 128]), tokens=st.integers(1, 130))
def test_float32_is_what_transformers_computes(isa: str, shape: Shape, block_size: int, tokens: int) -> None:
    ids = np.random.default_rng(tokens).integers(0, shape.vocabulary, tokens)
    with torch.inference_mode():
        expected = shape.build(torch.float32)(torch.from_numpy(ids)[None]).logits[0].numpy()
    served = Served(shape, torch.float32, block_size, isa)
    found = served.run([(ids, 0, served.blocks_for(tokens, 3))], every=True)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


FORMS = {
    "float32": (torch.float32, "", ""),
    "bfloat16": (torch.bfloat16, "", ""),
    "int8": (torch.bfloat16, "int8", "int8"),
    "int4": (torch.bfloat16, "int4", ""),
}


@functools.cache
def long_lived(isa: str, form: str) -> Served:
    shape = Shape("qwen3", 64, 2, 2, 64, 128, 100, 700)
    dtype, weights, cache = FORMS[form]
    return Served(shape, dtype, 32, isa, 300, weights, cache)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=10, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 1099), max_size=6, unique=True).map(sorted),
    others=st.lists(st.integers(1, 300), max_size=4),
    place=st.integers(0, 4),
)
@example(cuts=[40, 1092], others=[], place=0)  # 8 tokens: quantized weights are multiplied without tiles
@example(cuts=[1091], others=[], place=0)  # 9: with tiles
def test_the_same_bits_alone_in_a_batch_and_in_chunks(
    isa: str, form: str, cuts: list[int], others: list[int], place: int
) -> None:
    served = long_lived(isa, form)
    random = np.random.default_rng(5)
    ids = random.integers(0, 100, 1100)
    alone = served.run([(ids, 0, served.blocks_for(1100, 1))])[0]
    neighbours = [(random.integers(0, 100, n), 0, served.blocks_for(n, 100 + 12 * i)) for i, n in enumerate(others)]
    blocks = served.blocks_for(1100, 50)
    found = alone
    for begin, end in zip([0, *cuts], [*cuts, 1100], strict=True):
        rows = list(neighbours)
        rows.insert(place, (ids[begin:end], begin, blocks))
        found = served.run(rows)[min(place, len(neighbours))]
    assert (found == alone).all()


@pytest.mark.parametrize("form", FORMS)
def test_isas_differ_only_in_rounding(form: str) -> None:
    ids = np.random.default_rng(2).integers(0, 100, 90)
    results = []
    for isa in ISAS:
        served = long_lived(isa, form)
        results.append(served.run([(ids, 0, served.blocks_for(90, 200))])[0])
    for one in results[1:]:
        assert np.abs(one - results[0]).max() < 0.05 * np.abs(results[0]).max()


def round_weights(model: Any, weights: str) -> None:
    """To what the quantised forms hold."""
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            kind = "int8" if name == "lm_head" else weights
            linear.weight.copy_(quantize(linear.weight, kind).dequantize())


@pytest.mark.parametrize(("form", "most"), [("int8", 0.03), ("int4", 0.06)])
@pytest.mark.parametrize("isa", ISAS)
def test_quantised_stacks_compute_what_their_weights_say(isa: str, form: str, most: float) -> None:
    """Against transformers with the rounded weights: what is left is the rounding of activations, keys and values."""
    shape = Shape("qwen3", 64, 2, 2, 64, 128, 100, None)
    dtype, weights, cache = FORMS[form]
    served = Served(shape, dtype, 32, isa, BLOCKS, weights, cache)
    model = shape.build(dtype).float()
    round_weights(model, weights)
    ids = np.random.default_rng(3).integers(0, 100, 200)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    found = served.run([(ids, 0, served.blocks_for(200, 1))], every=True)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < most


def fill_values(served: Served, num_blocks: int, blocks: list[int], bits: int) -> None:
    """Set all values of some blocks of the cache: `bits` of float32, or of bfloat16 if they fit 16."""
    spec = served.stack._spec
    dtype = np.uint32 if bits >> 16 else np.uint16
    region = spec.layer[0].values - spec.layer[0].keys
    for layer in range(spec.layers):
        cache = np.ctypeslib.as_array((ctypes.c_uint8 * region).from_address(spec.layer[layer].values))
        cache.view(dtype).reshape(num_blocks, -1)[blocks] = bits


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_what_another_row_left_in_a_block_does_no_harm(isa: str, form: str) -> None:
    """Values of infinity behind a row's end: a share of zero would make them no numbers."""
    ids = np.random.default_rng(4).integers(0, 100, 37)
    served = long_lived(isa, form)
    blocks = served.blocks_for(37, 250)
    clean = served.run([(ids, 0, blocks)])[0]
    fill_values(served, 300, blocks, 0x7F800000 if form == "float32" else 0x7F80)
    assert (served.run([(ids, 0, blocks)])[0] == clean).all()
    for end in (20, 30):  # in chunks, of which the first ones end before the last of the infinities
        served.run([(ids[:end], 0, blocks)])
    assert (served.run([(ids[30:], 30, blocks)])[0] == clean).all()
