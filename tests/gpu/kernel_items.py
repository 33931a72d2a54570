"""Each kernel against float64 torch, on poisoned memory, in each storage dtype; and twice with the same bits.

The cases are those of the tests in tests/engine/kernels/triton, with the shapes and tiles of the product.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.kernels.triton import fp8
from engine.kernels.triton.activation import gelu_tanh_mul, silu_mul
from engine.kernels.triton.quantized import FEW_ROWS
from engine.kernels.triton.token_masks import exclude_tokens
from engine.messages import Sampling
from tests.engine.kernels.triton import attention_case, logprobs_case, masks_case, rotary_case, sampling_case
from tests.engine.kernels.triton.elementwise_case import check_embeddings, check_gated, check_norm
from tests.engine.kernels.triton.numbers import DTYPES, poisoned, random_numbers
from tests.engine.kernels.triton.quantized_case import check_product
from tests.gpu.environment import Environment
from tests.gpu.rows import SkipError, is_device_fault

Case = Callable[[], tuple[Tensor, ...]]
ATTENTION = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def kernels(env: Environment, kind: str) -> None:
    """Run the cases of a kind; one row for each dtype or variant."""
    env.device  # noqa: B018 the GPU and its stream are this thread's from here on
    for name, case in KINDS[kind](env).items():
        try:
            first, second = ([_bits(one) for one in case()] for _ in range(2))
        except SkipError as reason:
            env.report.row(name, "skipped", note=str(reason))
        except Exception as error:
            if is_device_fault(error):
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            env.report.row(name, "wrong" if isinstance(error, AssertionError) else "error", passed=False, note=text)
        else:
            same = all(map(torch.equal, first, second))
            env.report.row(name, "right" if same else "right, other bits the second time", passed=same)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _elementwise(env: Environment) -> dict[str, Case]:
    place, hidden = env.torch_device, env.sizes.kernel_shapes["hidden"]
    made: dict[str, Case] = {}
    for dtype in DTYPES:
        made[f"rms_norm, {_name(dtype)}"] = partial(check_norm, 37, hidden, True, 0.0, dtype, 1, place)
        made[f"rms_norm without delta, {_name(dtype)}"] = partial(check_norm, 5, 576, False, 1.0, dtype, 2, place)
        made[f"silu_mul, {_name(dtype)}"] = partial(check_gated, silu_mul, 19, 3 * hidden, dtype, 3, place)
        made[f"gelu_tanh_mul, {_name(dtype)}"] = partial(check_gated, gelu_tanh_mul, 3, 70, dtype, 4, place)
        made[f"embeddings of encoders, {_name(dtype)}"] = partial(check_embeddings, 50, hidden, 20, dtype, 5, place)
    return made


def _rotary(env: Environment) -> dict[str, Case]:
    dim = env.sizes.kernel_shapes["head_dim"]
    base = rotary_case.Case(tokens=21, heads=8, kv_heads=2, head_dim=dim, rotary_dim=dim, block_size=32)
    kinds = {
        "halves": {}, "norms, part of the dims": {"rotary_dim": dim // 2, "norms": True},
        "interleaved": {"interleaved": True}, "no rotation": {"rotary_dim": 0, "norms": True},
        "sections": {"sections": (dim // 2 - 4, 2, 2)},
        "interleaved sections": {"sections": (dim // 2 - 4, 2, 2), "interleaved_sections": True},
        "int8 cache": {"cache_dtype": torch.int8}, "fp8 cache": {"cache_dtype": torch.float8_e4m3fn},
    }  # fmt: skip
    made: dict[str, Case] = {}
    for name, more in kinds.items():
        for dtype in DTYPES if name == "halves" else (torch.bfloat16,):
            case = replace(base, dtype=dtype, **more)
            if case.cache_dtype == torch.float8_e4m3fn:
                case = replace(case, cache_dtype=_fp8(env))
            made[f"{name}, {_name(dtype)}"] = partial(rotary_case.run_and_check, case, env.torch_device)
    return made


def _fp8(env: Environment) -> torch.dtype:
    """How the device stores fp8, see engine/kernels/triton/kv_storage.py."""
    return torch.uint8 if env.target in ("sm_80", "gfx942") else torch.float8_e4m3fn


def _attend(env: Environment, case: attention_case.Case) -> tuple[Tensor, ...]:
    setup = attention_case.Setup(case, env.torch_device)
    tolerance = ATTENTION[case.dtype]
    return (setup.check(tolerance),)


def _base(env: Environment) -> attention_case.Case:
    shapes = env.sizes.kernel_shapes
    context, dim = shapes["context"], shapes["head_dim"]
    rows = ((context, 1), (0, 9), (3, 1), (context // 2, context // 4), (17, 2), (0, 1), (5, 0), (context, 3))
    return attention_case.Case(
        rows, kv_heads=2, group=4, head_dim=dim, block_size=32, programs=66, target=env.target, slots=True, shared=1
    )


def _attention(env: Environment) -> dict[str, Case]:
    base = _base(env)
    shapes = {
        "": base, ", one head each": replace(base, group=1, kv_heads=3), ", 7 heads share": replace(base, group=7),
        ", few programs": replace(base, programs=2),
    }  # fmt: skip
    made = {
        f"{_name(dtype)}{name}": partial(_attend, env, replace(case, dtype=dtype))
        for name, case in shapes.items()
        for dtype in (DTYPES if not name else (torch.bfloat16,))
    }
    if not env.stand_in:  # the interpreter is slow
        for dim in (64, 80, 96, 256):
            made[f"bfloat16, heads of {dim}"] = partial(_attend, env, replace(base, dtype=torch.bfloat16, head_dim=dim))
    return made


def _variants(env: Environment) -> dict[str, Case]:
    base, window = replace(_base(env), dtype=torch.bfloat16), env.sizes.kernel_shapes["context"] // 3
    variants = {
        "window": {"window": window}, "softcap": {"softcap": 20.0}, "sinks": {"sinks": True},
        "spans": {"spans": True, "window": None}, "window and sinks": {"window": window, "sinks": True},
        "all": {"window": window, "softcap": 5.0, "sinks": True, "spans": True},
    }  # fmt: skip
    return {name: partial(_attend, env, replace(base, **more)) for name, more in variants.items()}


def _eight_bits(env: Environment) -> dict[str, Case]:
    base = _base(env)
    return {
        f"{name} cache, {_name(dtype)}": partial(_attend, env, replace(base, dtype=dtype, cache_dtype=cache))
        for name, cache in (("int8", torch.int8), ("fp8", _fp8(env)))
        for dtype in (torch.float16, torch.bfloat16)
    }


def _sampling(env: Environment) -> dict[str, Case]:
    vocabulary = env.sizes.kernel_shapes["vocabulary"]
    params = [
        Sampling(), Sampling(temperature=0.9, seed=2), Sampling(temperature=0.7, top_k=50, seed=2**64 - 3),
        Sampling(temperature=1.2, top_p=0.8, seed=4), Sampling(temperature=1.5, min_p=0.1, top_k=30, seed=5),
    ]  # fmt: skip

    def choose(filtered: bool, dtype: torch.dtype) -> tuple[Tensor, ...]:
        rows = params if filtered else params[:2]
        logits = random_numbers(len(rows), vocabulary, seed=6, scale=3).to(dtype)
        counts = list(range(len(rows)))
        tokens = sampling_case.choose(logits, rows, counts, 1, 2, filtered, env.torch_device)
        assert tokens == sampling_case.by_the_cpu(logits, rows, counts), "not the CPU's tokens"
        return (torch.tensor(tokens),)

    def masked(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (masks_case.check_masks(exclude_tokens, 6, 4, vocabulary, dtype, 5, env.torch_device),)

    made: dict[str, Case] = {}
    for dtype in DTYPES:
        made[f"with filters, {_name(dtype)}"] = partial(choose, True, dtype)
        made[f"logprobs, {_name(dtype)}"] = partial(
            logprobs_case.check_logprobs, 5, vocabulary, 5, 10**6, dtype, 3, env.torch_device
        )
        made[f"masks, {_name(dtype)}"] = partial(masked, dtype)
    made["without filters, bfloat16"] = partial(choose, False, torch.bfloat16)
    return made


def _products(env: Environment) -> dict[str, Case]:
    place, inputs = env.torch_device, 512
    weight = random_numbers(192, inputs, seed=7)

    def in_fp8(rows: int) -> tuple[Tensor, ...]:
        if not env.stand_in and torch.cuda.get_device_capability() < (8, 9):
            raise SkipError("products in fp8 need compute capability 8.9")
        packed = fp8.quantize_fp8(weight.to(place))
        x = random_numbers(rows, inputs, seed=9, device=place).bfloat16()
        values = torch.empty(rows, inputs, dtype=torch.float8_e4m3fn, device=place)
        scales = poisoned(rows, device=place)
        out = fp8.fp8_linear(x, packed, values, scales)
        torch.testing.assert_close(out.float(), fp8.reference(values, scales, packed), rtol=2**-6, atol=0.1)
        return (out,)

    def integer(kind: str, group: int, rows: int) -> tuple[Tensor, ...]:
        return (check_product(rows, 192, inputs // group, kind, group, torch.bfloat16, 8, place),)

    made: dict[str, Case] = {
        f"{kind}, {rows} rows": partial(integer, kind, group, rows)
        for kind, group in (("int8", 64), ("int4", 32))
        for rows in (3, FEW_ROWS + 9)
    }
    return made | {f"fp8, {rows} rows": partial(in_fp8, rows) for rows in (3, 48)}


KINDS: dict[str, Callable[[Environment], dict[str, Case]]] = {
    "norm and activation": _elementwise,
    "rotary and cache": _rotary,
    "attention": _attention,
    "attention variants": _variants,
    "8-bit caches": _eight_bits,
    "sampling": _sampling,
    "products": _products,
}
