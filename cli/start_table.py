"""The table that `redline serve` prints once its engine is up."""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.config import ABLATIONS, EngineConfig, watermark_blocks
from engine.text import human_bytes


def show_start(console: Console, engine: Any) -> None:
    """Print what was resolved: the model, memory by line, what fits, and where the start's time went."""
    ready = engine.ready
    table = Table(title=f"Redline serves {engine.config.name}", title_justify="left", show_header=False, box=None)
    for what, value, flag in [
        ("model path", ready.model_path, ""),
        *replicas(engine.config),
        ("device", ready.device, "--device"),
        ("dtype", ready.dtype, "--dtype"),
        ("kernels", ready.kernels, "--kernels"),
        *((line.what, human_bytes(line.bytes), line.flag) for line in ready.memory),
        ("KV blocks", f"{ready.num_blocks:,} of {ready.block_size} tokens", "--block-size"),
        *kv_groups(ready),
        ("max-model-len", f"{ready.max_model_len:,} tokens", "--max-model-len"),
        ("sequences of that length", f"{ready.sequences} at once", "--kv-cache-memory-bytes, --max-num-seqs"),
        (
            "rows, budget",
            f"{ready.max_num_seqs:,} requests, {ready.max_num_batched_tokens:,} tokens a step",
            "--max-num-seqs, --max-num-batched-tokens",
        ),
        ("prefix caching", "on" if ready.prefix_caching else "off", "--no-enable-prefix-caching"),
        *sampling_defaults(engine),
        *baseline(engine.config, ready),
        ("start", ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in ready.seconds), ""),
    ]:
        table.add_row(what, value, Text(flag, style="dim"))
    console.print(table)
    for warning in engine.warnings:
        console.print(f"warning: {warning}")


def sampling_defaults(engine: Any) -> list[tuple[str, str, str]]:
    """What requests get that say nothing of it, where that isn't what other models give."""
    values = ", ".join(f"{name} {value:g}" for name, value in engine.generation.sampling.items())
    return [("sampling defaults", values, "--generation-config")] if values else []


def replicas(config: EngineConfig) -> list[tuple[str, str, str]]:
    """The line for several: none for one."""
    count = config.data_parallel_size
    return [("replicas", f"{count}, routed by {config.routing}; of each:", "--dp, --routing")] if count > 1 else []


def baseline(config: EngineConfig, ready: Any) -> list[tuple[str, str, str]]:
    """Lines for what the engine does otherwise than V1: none for V1 itself."""
    lines = []
    if config.engine == "v0":
        budget = f"a budget of {ready.max_num_batched_tokens:,} tokens"
        prefill = f"prompts whole, apart from decodes, {budget} for the prompts of a step"
        if config.enable_chunked_prefill:
            prefill = f"prompts in chunks beside the decodes, {budget}"
        lines.append(("engine", "V0 as it was, emulated", "--engine"))
        lines.append(("  prefill", prefill, "--enable-chunked-prefill"))
        steps = ready.scheduler_steps
        lines.append(("  decode", f"{steps} step{'s' if steps > 1 else ''} at a time", "--num-scheduler-steps"))
    elif config.ablations:
        lines.append(("engine", "V1 without parts of it", "--ablate"))
    for name, what in ABLATIONS.items():
        if name in config.ablations:
            extra = (
                f" ({watermark_blocks(ready.num_blocks + 1):,} of {ready.num_blocks:,})" if name == "watermark" else ""
            )
            lines.append((f"  {name}", what + extra, ""))
    return lines


def kv_groups(ready: Any) -> list[tuple[str, str, str]]:
    """A line on the groups of layers that share blocks, where a window is among them."""
    if not any(ready.kv_windows):
        return []
    groups = Counter(ready.kv_windows).items()
    sees = [
        f"{count} of the last {window:,} tokens" if window else f"{count} of all tokens" for window, count in groups
    ]
    return [("KV groups", ", ".join(sees), "")]
