"""What `make aot` compiles: each Triton kernel for the shapes of Llama-3.1-8B, with the product's tiles and constants.

Attention is compiled for head dims of 64, 128 and 256 and for all of its variants: caches in 8 bits, windows, softcaps,
sinks, bidirectional spans.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.grammar import WORD_BITS
from engine.kernels.quantization import GROUPS
from engine.kernels.triton import (
    activation,
    attention,
    fp8,
    logprobs,
    minimum_weight,
    mm_embeddings,
    norm,
    quantized,
    rotary,
    sampling,
    slot_state,
    tiles,
    token_masks,
)
from engine.kernels.triton.attention import AttentionShape, Scores
from engine.kernels.triton.launch import next_power_of_2

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEADS, KV_HEADS, HEAD_DIM, BLOCK, HIDDEN, INNER, VOCABULARY = 32, 8, 128, 32, 4096, 14336, 128256
HEAD_DIMS = (64, 128, 256)
WINDOW = 4096
SCORES = {  # variants of attention: window, softcap, sinks, bidirectional spans
    "window": (WINDOW, None, False, False),
    "softcap": (WINDOW, 50.0, False, False),
    "sinks": (128, None, True, False),
    "spans": (1024, None, False, True),
}
PRODUCT_ROWS = (16, 32, 64)  # tiles of products with int8 and int4 weights
# Variants in the stored table.
LLAMA = ("", "silu", f"hidden {HIDDEN}", f"dim {HEAD_DIM}", "64 rows", f"inputs {HIDDEN}", "int4")
CACHES = {"int8": "*i8", "fp8": "*fp8e4nv"}
WITHOUT_FP8 = ("sm_80", "gfx942")  # these read fp8 as bytes, see engine/kernels/triton/kv_storage.py
DIVISIBLE = ("token_stride", "row_stride")  # arguments that are multiples of 16 besides the addresses


@dataclass(frozen=True)
class Case:
    """A kernel as it is compiled once.

    types: of the arguments; arguments without a type are constants, and those that are missing there are None.
    """

    kernel: str
    variant: str
    dtype: str
    target: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    tile: str = ""
    options: dict[str, int] = field(default_factory=dict)
    programs: int | None = None  # that tiles.py expects on a multiprocessor at a time

    @property
    def name(self) -> str:
        return "|".join((self.kernel, self.variant, self.dtype, self.target))

    @property
    def stored(self) -> bool:
        """Whether the stored table has the case: Llama-3.1-8B in bfloat16, one for each kernel and target."""
        return self.dtype in ("bf16", "int32") and self.variant in LLAMA


def pointers(dtype: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), f"*{dtype}")


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def cases() -> list[Case]:
    """All cases, those of a target together."""
    made = []
    for target in TARGETS:
        made += [Case(*case[:2], "int32", target, *case[2:]) for case in _slot_state()]
        for dtype in DTYPES:
            made += [Case(*case[:2], dtype, target, *case[2:]) for case in _elementwise(dtype)]
            made += [Case(*case[:2], dtype, target, *case[2:]) for case in _logits(dtype)]
            made += [Case(*case[:2], dtype, target, *case[2:]) for case in _products(dtype, target)]
            made += _fp8_rows(dtype, target)
            made += _cache_writes(dtype, target)
            made += _attention(dtype, target)
    return made


def _slot_state() -> Iterator[tuple[Any, ...]]:
    size = {"SIZE": slot_state.SIZE}
    tile = str(slot_state.SIZE)
    types = pointers("i32", "ids last_token slot_of slots tokens table rows columns values") | integers("stride n")
    yield "slot_state.gather_ids", "", slot_state.gather_ids_kernel, types, size, tile
    yield "slot_state.append_tokens", "", slot_state.append_tokens_kernel, types, size, tile
    yield "slot_state.write_elements", "", slot_state.write_elements_kernel, types, size, tile
    width = slot_state.MAX_WIDTH
    constants = {"WIDTH": 4096, "SIZE": 1, "COLUMNS": width}
    yield "slot_state.write_rows", "", slot_state.write_rows_kernel, types, constants, f"1x{width}"


def _elementwise(dtype: str) -> Iterator[tuple[Any, ...]]:
    types = pointers(dtype, "delta weight out") | {"residual": "*fp32", "epsilon": "fp32", "offset": "fp32"}
    types |= integers("tokens")
    for hidden in (HIDDEN, 2 * HIDDEN):
        constants = {"HAS_DELTA": True, "HIDDEN": hidden, "WIDTH": next_power_of_2(hidden), "ROWS": 1}
        warps = {"num_warps": min(norm.MAX_WARPS, hidden // norm.WIDTH_PER_WARP)}
        yield "norm.rms_norm", f"hidden {hidden}", norm.rms_norm_kernel, types, constants, f"1x{hidden}", warps
    types = pointers(dtype, "gate_up out") | integers("tokens")
    for gelu in (False, True):
        constants = {"N": INNER, "WIDTH": activation.MAX_WIDTH, "ROWS": 1, "GELU": gelu}
        variant, tile = "gelu" if gelu else "silu", f"1x{activation.MAX_WIDTH}"
        yield "activation.gated", variant, activation.gated_kernel, types, constants, tile
    types = pointers(dtype, "hidden embeddings") | {"sources": "*i32"} | integers("stride tokens")
    constants = {"HIDDEN": HIDDEN, "WIDTH": mm_embeddings.MAX_WIDTH, "ROWS": 1}
    tile = f"1x{mm_embeddings.MAX_WIDTH}"
    yield "mm_embeddings.merge", "", mm_embeddings.merge_kernel, types, constants, tile


def _logits(dtype: str) -> Iterator[tuple[Any, ...]]:
    shared = pointers(dtype, "logits") | integers("stride vocabulary runs width first_run own_runs first_token")
    types = shared | pointers("fp32", "tops weights minimums") | pointers("i32", "parameters slots counts tokens out")
    runs = next_power_of_2(-(-VOCABULARY // sampling.RUN))
    run, tile = {"RUN": sampling.RUN}, str(sampling.RUN)
    yield "sampling.runs", "", sampling.runs_kernel, types, run, tile
    yield "sampling.filter", "", sampling.filter_kernel, types, run, tile
    for filtered in (False, True):
        constants = run | {"RUNS": runs, "FILTERED": filtered}
        yield "sampling.pick", "filtered" if filtered else "", sampling.pick_kernel, types, constants, tile
    constants = run | {"RUNS": runs, "TILE_RUNS": minimum_weight.TILE_RUNS}
    warps = {"num_warps": minimum_weight.WARPS}
    whole = f"{minimum_weight.TILE_RUNS}x{sampling.RUN}"
    yield "minimum_weight.minimum", "", minimum_weight.minimum_kernel, types, constants, whole, warps
    words = pointers("i32", "rows words") | integers("width")
    constants = {"WORDS": token_masks.WORDS, "BITS": WORD_BITS}
    tile = f"{token_masks.WORDS}x{WORD_BITS}"
    yield "token_masks.exclude", "", token_masks.exclude_kernel, shared | words, constants, tile
    types = shared | pointers("i32", "rows tokens firsts greater ids ranks") | pointers("fp32", "tops sums values")
    run, tile = {"RUN": logprobs.RUN}, str(logprobs.RUN)
    yield "logprobs.run_sums", "", logprobs.run_sums_kernel, types, run, tile
    yield "logprobs.logprobs", "", logprobs.logprobs_kernel, types, run | {"RUNS": runs}, tile


def _products(dtype: str, target: str) -> Iterator[tuple[Any, ...]]:
    """Products with int8 and int4 weights: down, whose inputs are divided among programs."""
    amd = target.startswith("gfx")
    types = pointers(dtype, "x out") | pointers("bf16", "scales") | {"partials": "*fp32"} | integers("rows row_stride")
    for kind, kernel, weight in (("int8", quantized.int8_kernel, "*i8"), ("int4", quantized.int4_kernel, "*u8")):
        minimums = pointers("bf16", "minimums" if kind == "int4" else "")
        for rows in [one for one in PRODUCT_ROWS if one <= quantized.few_rows(DTYPES[dtype])]:
            constants = quantized.few_rows_constants(rows, HIDDEN, INNER, GROUPS[kind], DTYPES[dtype], amd)
            tile, options = (
                f"{rows}x{quantized.OUTPUTS_PER_PROGRAM}",
                quantized.few_rows_options(rows, DTYPES[dtype], amd),
            )
            arguments = types | minimums | {"weight": weight}
            yield f"quantized.{kind}", f"{rows} rows", kernel, arguments, constants, tile, options
        variant, constants = kind, quantized.convert_constants(HIDDEN, GROUPS[kind], kind == "int4")
        arguments = pointers(dtype, "out") | pointers("bf16", "scales minimums") | {"weight": weight}
        tile = f"{quantized.CONVERTED // constants['WIDTH']}x{constants['WIDTH']}"
        yield "quantized.convert", variant, quantized.convert_kernel, arguments | integers("first end"), constants, tile
    sums = pointers("fp32", "partials") | pointers(dtype, "out") | integers("n")
    constants = {"SPLITS": quantized.MAX_SPLITS, "SIZE": quantized.ADDED}
    yield "quantized.add_partials", "", quantized.add_partials_kernel, sums, constants, str(quantized.ADDED)


def _fp8_rows(dtype: str, target: str) -> list[Case]:
    """Activations in fp8; where a target has no conversion, as bytes."""
    made = []
    for inputs in (HIDDEN, INNER):
        width = next_power_of_2(inputs)
        types = pointers(dtype, "x") | {"out": "*u8" if target in WITHOUT_FP8 else "*fp8e4nv", "scales": "*fp32"}
        constants, warps = {"INPUTS": inputs, "WIDTH": width}, {"num_warps": fp8.quantize_warps(width)}
        variant, kernel, types = f"inputs {inputs}", fp8.quantize_rows_kernel, types | integers("row_stride")
        made.append(Case("fp8.quantize_rows", variant, dtype, target, kernel, types, constants, f"1x{width}", warps))
    return made


def _cache(dtype: str, cache: str, target: str) -> dict[str, str]:
    """Types of a cache: in `dtype`, or in 8 bits with scales."""
    if cache not in CACHES:
        return pointers(dtype, "keys values")
    stored = "*u8" if cache == "fp8" and target in WITHOUT_FP8 else CACHES[cache]
    return {"keys": stored, "values": stored} | pointers("fp32", "key_scales value_scales")


def _cache_writes(dtype: str, target: str) -> list[Case]:
    shape = AttentionShape(HEADS, KV_HEADS, HEAD_DIM, BLOCK)
    turned = rotary.Rotary(*(torch.empty(1, HEAD_DIM // 2, device="meta") for _ in range(2)))
    numbers = {"epsilon": "fp32", "largest": "fp32"} | pointers("i32", "positions cache_index")
    numbers |= integers("tokens key_stride key_head_stride value_stride value_head_stride")
    new = pointers(dtype, "qkv new_keys new_values") | pointers("fp32", "cos sin")
    constants = rotary.rotary_constants(shape, turned) | {"LINES": rotary.LINES, "axis_stride": 1}
    write = {name: constants[name] for name in ("KV_HEADS", "DIM", "BLOCK", "PAIRS_P", "LINES")}
    made = []
    for cache in ("", *CACHES):
        variant = f"{cache} cache" if cache else ""
        types = numbers | new | _cache(dtype, cache, target)
        normed = types | pointers(dtype, "query_norm key_norm")
        tile = f"{rotary.LINES}x{HEAD_DIM}"
        for name, kernel, arguments, values in (
            ("rotary.rotate", rotary.rotate_kernel, types, constants),
            ("rotary.rotate", rotary.rotate_kernel, normed, constants),
            ("rotary.write", rotary.write_kernel, types, write),
        ):
            which = "norms " * (arguments is normed) + variant
            made.append(Case(name, which.strip(), dtype, target, kernel, arguments, values, tile))
    return made


def _attention(dtype: str, target: str) -> list[Case]:
    made = []
    for dim in HEAD_DIMS:
        shape = AttentionShape(HEADS, KV_HEADS, dim, BLOCK)
        made.append(_merge(shape, dtype, target))
        for variant in ("", *CACHES, *SCORES) if dtype == "bf16" else ("",):
            for which in (0, 1):
                made.append(_attend(shape, variant, dtype, target, which))
    return made


def _merge(shape: AttentionShape, dtype: str, target: str) -> Case:
    types = pointers(dtype, "out") | pointers("fp32", "sums tops weights")
    types |= pointers("i32", "merges sizes starts counts")
    constants = attention.merge_constants(shape)
    tile, warps = f"{constants['PARTS']}x{shape.place_lines}", {"num_warps": attention.MERGE_WARPS}
    variant = f"dim {shape.head_dim}"
    return Case("attention.merge", variant, dtype, target, attention.merge_kernel, types, constants, tile, warps)


def _attend(shape: AttentionShape, variant: str, dtype: str, target: str, which: int) -> Case:
    types = pointers(dtype, "query out") | _cache(dtype, variant, target) | pointers("fp32", "sums tops weights")
    types |= pointers("i32", "items sizes starts counts num_computed tables slots")
    types |= {"scaling": "fp32", "softcap": "fp32"} | integers("token_stride table_width")
    window, softcap, sinks, spans = SCORES.get(variant, (None, None, False, False))
    types |= pointers(dtype, "sinks" * sinks) | pointers("i32", "ends" * spans)
    made = tiles.tilings(shape, DTYPES[dtype].itemsize, target, shape.kv_heads, variant in CACHES)
    tiling = made.prefill if which else made.decode
    constants = attention.attend_constants(shape, Scores(0.1, window, softcap), tiling, DTYPES[dtype], which)
    lines = tiling.queries * shape.padded_group
    phase = ("decode", "prefill")[which]
    name = f"dim {shape.head_dim} {variant} cache" if variant in CACHES else f"dim {shape.head_dim} {variant}"
    return Case(
        f"attention.attend {phase}", name.strip(), dtype, target, attention.attend_kernel, types, constants,
        f"{lines}x{tiling.keys}, {tiling.warps} warps, {tiling.stages} stages",
        {"num_warps": tiling.warps, "num_stages": tiling.stages}, tiling.programs,
    )  # fmt: skip
