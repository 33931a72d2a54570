"""`make bench-load`: time and peak memory of loading 2 GB, compared with transformers' from_pretrained.

A Llama of SIZE_GB=2 (bfloat16, random weights, four files) is written once to a temporary folder. Each variant loads
it in a process of its own, interleaved, ROUNDS=3 times, from files in the page cache. Memory is the peak above the
memory after the imports. Variants: transformers; the generic backend, whole and the shard of one rank of two; the same
from Mistral's own format, which has another order of rows in queries and keys; the C++ kernels, which pack weights as
they are read. Prints a table and writes results/bench-load.json.
"""

import contextlib
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tests.perf.child_processes import run_child

RESULTS = Path("results") / "bench-load.json"
WAYS = (
    "transformers",
    "redline",
    "redline, rank 0 of 2",
    "redline, Mistral's form",
    "redline, Mistral's form, rank 0 of 2",
    "redline, fused stack",
    "redline, fused stack in int8",
)
NATIVE = "native"  # the folder of the same weights in Mistral's format
PERIOD_S = 0.002


def write(folder: Path, gigabytes: float) -> int:
    """Write a checkpoint of about this size; returns its bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = 4 * 2048 * 2048 + 3 * 2048 * 8192
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / layer))
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="512MB")
    write_native(folder, config)
    return sum(parameter.nbytes for parameter in model.parameters())


def write_native(folder: Path, config: Any) -> None:
    """Write the same weights under Mistral's names. Random rows need no reordering."""
    from safetensors.torch import load_file, save_file

    from tests.engine.model.checkpoints.mistral_files import mistral_name, params_of

    (folder / NATIVE).mkdir()
    (folder / NATIVE / "params.json").write_text(json.dumps(params_of(config)))
    for file in folder.glob("model*.safetensors"):
        tensors = {mistral_name(name): value for name, value in load_file(file).items()}
        save_file(tensors, folder / NATIVE / file.name.replace("model", "consolidated"))


def load(way: str, folder: str) -> Any:
    """Load one variant, after the imports. The result is kept until memory was read."""
    from engine.config import EngineConfig
    from engine.model.loading.open_model import open_model
    from engine.model.model_info import read_model_info
    from engine.model.sharding.shard_model import shard_model
    from engine.model.sharding.tp_plan import plan_tensor_parallel
    from engine.worker import fused_stack
    from engine.worker.fused_stack import StackFormats

    if way == "transformers":
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    if "Mistral" in way:
        folder = f"{folder}/{NATIVE}"
    config = EngineConfig(model=folder, tensor_parallel_size=2 if "rank" in way else 1)
    model_info = read_model_info(config)
    meta_model = open_model(config, model_info)
    if "rank" in way:
        shard_model(meta_model, plan_tensor_parallel(config, model_info), _Alone())
    if "fused" not in way:
        meta_model.fill()
        return meta_model.model
    form = StackFormats("bfloat16", "int8" if "int8" in way else "bfloat16", "bfloat16")
    return fused_stack.make_spec(
        meta_model.model, form, 1, 16, model_info.kv_groups, partial=False, fill=meta_model.fill
    )


class _Alone:
    """Rank 0 of two ranks, for loading only."""

    rank, size = 0, 2


def child(way: str, folder: str) -> None:
    """Measure one variant and print the result as JSON."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401

    from engine.heap import large_allocations_mapped

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    process, ended, most = psutil.Process(), threading.Event(), 0

    def watch() -> None:
        nonlocal most
        while not ended.wait(PERIOD_S):
            most = max(most, process.memory_info().rss)

    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    with contextlib.nullcontext() if way == "transformers" else large_allocations_mapped():
        held = load(way, folder)
    if way == "transformers":  # its weights are pages of the files until they are touched
        for parameter in held.parameters():
            parameter.sum()
    seconds = time.perf_counter() - began
    ended.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "peak_bytes": most - before}))


def main() -> None:
    rounds = int(os.environ.get("ROUNDS", "3"))
    console = Console(width=None if sys.stdout.isatty() else 120)
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), float(os.environ.get("SIZE_GB", "2")))
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS:
                command = [sys.executable, "-m", "tests.perf.bench_load", way, folder]
                result = run_child(command, capture_output=True, text=True, check=True)
                found[way].append(json.loads(result.stdout.splitlines()[-1]))
                console.print(f"round {number + 1}  {way:36} {found[way][-1]['seconds']:.2f} s")
    embedding = 32000 * 2048 * 2  # stays in bfloat16
    int8 = embedding + (size - embedding) * (1 + 2 / 64) / 2
    held = {way: size / 2 for way in WAYS if "rank" in way} | {"redline, fused stack in int8": int8}
    rows = []
    for way in WAYS:
        weights = held.get(way, size)
        peak = median(one["peak_bytes"] for one in found[way])
        rows.append(
            {"way": way, "seconds": median(one["seconds"] for one in found[way]), "weights_mb": weights / 1e6,
             "peak_mb": peak / 1e6, "peak_of_weights": peak / weights}
        )  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=1))
    table = Table("way", "seconds", "weights, MB", "peak, MB", "peak / weights")
    for row in rows:
        numbers = (f"{row['seconds']:.2f}", f"{row['weights_mb']:,.0f}", f"{row['peak_mb']:,.0f}")
        table.add_row(str(row["way"]), *numbers, f"{row['peak_of_weights']:.2f}")
    console.print(table)


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
