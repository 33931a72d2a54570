"""What every kernel launch needs: whether kernels are interpreted, dtypes, and a check of where the arguments are."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.tile_table import target_of

DOT_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
INTERPRETED_TOKENS = (
    64  # tokens of a program in an elementwise kernel: each operation costs the interpreter 50 to 100 µs
)


def interpreted() -> bool:
    """Whether kernels are interpreted. TRITON_INTERPRET decides it when the modules with the kernels are imported."""
    return bool(triton.knobs.runtime.interpret)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the operands of `tl.dot` for numbers stored in `dtype`; float32 in the interpreter.

    Raises:
        ValueError: kernels don't compute in `dtype`.
    """
    if dtype not in DOT_DTYPES:
        raise ValueError(
            f"kernels compute in float32, float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
        )
    return tl.float32 if interpreted() else DOT_DTYPES[dtype]


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`: float32 is not rounded to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


def tokens_per_program(compiled: int) -> int:
    """Tokens that a program of an elementwise kernel computes: `compiled`, and more in the interpreter."""
    return INTERPRETED_TOKENS if interpreted() else compiled


def next_power_of_2(number: int) -> int:
    """The lowest power of two that is at least `number`, and 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True, slots=True)
class Gpu:
    """What tiles depend on. target: as in `tile_table.SHARED_KIB`."""

    target: str
    multiprocessors: int


def current_gpu(driver: Any = None) -> Gpu:
    """The calling thread's GPU.

    Args:
        driver: of Triton; None: the active one.

    Raises:
        ValueError: a GPU by NVIDIA with a compute capability below 8.0.
    """
    driver = driver or triton.runtime.driver.active
    arch = driver.get_current_target().arch  # 90, or gfx942
    target = target_of(divmod(arch, 10)) if isinstance(arch, int) else str(arch).partition(":")[0]
    properties = driver.utils.get_device_properties(driver.get_current_device())
    return Gpu(target, int(properties["multiprocessor_count"]))


def place_of(tensor: Tensor) -> object:
    """Where a tensor is. A stand-in device in tests replaces this function to tell its tensors from the host's."""
    return tensor.device


def check_device(*tensors: Tensor | None) -> None:
    """Check that all arguments of a kernel are on one device, which the kernels run on.

    A compiled kernel would read a host address on the device: an illegal access, reported by a later call.

    Raises:
        RuntimeError: naming the devices.
    """
    places = {place_of(tensor) for tensor in tensors if tensor is not None}
    if len(places) > 1:
        raise RuntimeError(f"arguments of a kernel are on different devices: {', '.join(sorted(map(str, places)))}")
    if not interpreted() and torch.device("cpu") in places:
        raise RuntimeError(
            "a compiled kernel can't read tensors of the CPU; set TRITON_INTERPRET=1 to interpret kernels"
        )
