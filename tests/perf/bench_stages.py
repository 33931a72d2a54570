"""`make bench-stages`: a model on one rank, on two tensor-parallel ranks and on two pipeline stages, on the same cores.

Three loads of a model with random weights: one request that decodes, several that decode together, and prompts alone.
The engines take turns, --rounds times; medians are reported, with the lowest and highest round. Prints a table and
writes results/bench-stages.json.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.results.environment import hardware
from engine.frontend.sampling_params import SamplingParams
from engine.llm import LLM

WAYS: dict[str, dict[str, int]] = {
    "one rank": {},
    "--tp 2": {"tensor_parallel_size": 2},
    "--pp 2": {"pipeline_parallel_size": 2},
}
# Requests at once, tokens of each prompt, output tokens of each.
LOADS: dict[str, tuple[int, int, int]] = {
    "one request decodes": (1, 16, 96),
    "16 requests decode": (16, 16, 96),
    "prompts": (8, 512, 1),
}
MODEL, VOCABULARY = "smollm2-135m", 49_152
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}  # that two ranks can divide


def measure(llm: LLM, load: str, seed: int) -> float:
    """Tokens per second: of outputs, or of prompts where each request has one output token."""
    count, length, new = LOADS[load]
    ids = np.random.default_rng(seed).integers(3, VOCABULARY, (count, length)).tolist()
    prompts: list[Any] = [{"prompt_token_ids": one} for one in ids]
    began = time.perf_counter()
    outputs = llm.generate(prompts, SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True))
    seconds = time.perf_counter() - began
    assert all(len(one.outputs[0].token_ids) == new for one in outputs)
    return count * (length if new == 1 else new) / seconds


def run(model: str, rounds: int) -> dict[tuple[str, str], list[float]]:
    found: dict[tuple[str, str], list[float]] = {(way, load): [] for way in WAYS for load in LOADS}
    for turn in range(rounds):
        for way, options in WAYS.items():
            fixed: dict[str, Any] = {"load_format": "dummy", "hf_overrides": HEADS, "max_model_len": 1024}
            with LLM(model, max_num_seqs=16, **fixed, **options) as llm:
                for load in LOADS:
                    measure(llm, load, 1_000_000 + turn)  # the pages of the cache, and durations of steps
                    found[way, load].append(measure(llm, load, turn))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = run(options.model, options.rounds)
    print(f"{'load':<22}" + "".join(f"{way:>26}" for way in WAYS))
    rows = []
    for load in LOADS:
        line = f"{load:<22}"
        for way in WAYS:
            rates = found[way, load]
            line += f"{median(rates):>12.0f} ({min(rates):.0f}-{max(rates):.0f})".rjust(26)
            rows.append(
                {
                    "model": options.model, "way": way, "load": load, "tokens_per_s": median(rates),
                    "lowest": min(rates), "highest": max(rates), "rounds": options.rounds, **hardware(),
                }
            )  # fmt: skip
        print(line)
    path = Path("results") / "bench-stages.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
