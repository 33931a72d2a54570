"""`make bench-rates`: the highest sustained rate of Redline and of vLLM on this CPU, with the articles' figures.

The articles' three kinds of requests (500/2000, 2048/128, 6000/4000) with a sixteenth of their tokens, as a sweep. Both
engines get the same rows, lengths and KV cache, prefix caching off, both cores; vLLM is at its best (compiled, see
cpu_peers.py). Needs VLLM_PYTHON; MODEL=… takes another model. Goes on where it was interrupted; results and figures are
in results/bench-rates.
"""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

from engine.model.resolve import resolve_model
from tests.perf.cpu_peers import KV_GB, MAX_TOKENS, ROWS, needed, vllm_subjects

OUT = Path("results") / "bench-rates"
SHORTER = 16
LENGTHS = ((500, 2000), (2048, 128), (6000, 4000))
MAX_MINUTES = 6.0  # of one engine on one kind of requests


def plan() -> dict[str, Any]:
    """The sweep, as a file of `redline sweep` has it."""
    needed("VLLM_PYTHON", "make bench-rates")
    model = resolve_model(os.environ.get("MODEL", "smollm2-135m"))
    vllm = vllm_subjects(model)[0]
    assert vllm.server is not None
    variables = [f"{name}={value}" for name, value in vllm.env.items()]
    redline = {
        "dtype": "bfloat16",
        "max-num-seqs": ROWS,
        "max-model-len": MAX_TOKENS,
        "kv-cache-memory-bytes": KV_GB << 30,
        "enable-prefix-caching": False,
    }
    return {
        "title": "Redline and vLLM on a CPU",
        "seed": 1,
        "model": str(model),
        "configurations": {
            "redline": {"serve": redline},
            "vllm": {
                "command": shlex.join(["env", *variables, *vllm.server]),
                "vocab_size": json.loads((model / "config.json").read_text())["vocab_size"],
                "note": "compiled, both cores",
            },
        },
        "workloads": [
            {"kind": "random", "input": given // SHORTER, "output": made // SHORTER} for given, made in LENGTHS
        ],
        "options": {"precision": "25%", "max_minutes": MAX_MINUTES},
    }


def main() -> None:
    OUT.parent.mkdir(exist_ok=True)
    file = OUT.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(plan(), sort_keys=False))
    os.execv(sys.executable, [sys.executable, "-m", "cli.main", "sweep", str(file), "--out", str(OUT)])


if __name__ == "__main__":
    main()
