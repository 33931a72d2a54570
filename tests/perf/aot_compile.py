"""Compiles the cases whose names are lines of the standard input; writes a JSON row for each to the standard output.

A process of its own, because TRITON_INTERPRET decides on import whether Triton's functions can be compiled.
"""

import io
import json
import os
import re
import sys
import time
from contextlib import redirect_stdout
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.perf.aot_cases import DIVISIBLE, Case, cases


def target_of(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


def compile_case(case: Case) -> dict[str, Any]:
    """Registers of a thread, bytes spilled by it, and shared memory of a program."""
    function = case.function
    signature = {name: case.types.get(name, "constexpr") for name in function.arg_names}
    constants = {name: case.constants.get(name) for name, type_ in signature.items() if type_ == "constexpr"}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, type_) in enumerate(signature.items())
        if type_.startswith("*") or name in DIVISIBLE
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    began = time.perf_counter()
    with redirect_stdout(log):  # Triton prints what ptxas says, see TRITON_DUMP_PTXAS_LOG
        compiled = triton.compile(source, target=target_of(case.target), options=dict(case.options))
    seconds = time.perf_counter() - began
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (_number(rf"\.vgpr{kind}_count:\s*(\d+)", text) for kind in ("", "_spill"))
        spills *= 4
    else:
        text = log.getvalue()
        registers, spills = _number(r"Used (\d+) registers", text), _number(r"(\d+) bytes spill stores", text)
    return {
        "kernel": case.kernel, "variant": case.variant, "dtype": case.dtype, "target": case.target, "tile": case.tile,
        "warps": compiled.metadata.num_warps, "registers": registers, "spills": spills,
        "shared_bytes": compiled.metadata.shared, "seconds": round(seconds, 2),
    }  # fmt: skip


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in {text[:2000]}")
    return int(found.group(1))


def main() -> int:
    os.nice(10)
    wanted = set(sys.stdin.read().splitlines())
    for case in cases():
        if case.name in wanted:
            try:
                row = compile_case(case)
            except Exception as error:  # Triton's passes raise whatever they like; the row says it
                row = {"kernel": case.kernel, "variant": case.variant, "dtype": case.dtype, "target": case.target,
                       "tile": case.tile, "error": f"{type(error).__name__}: {error}"[:500]}  # fmt: skip
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
