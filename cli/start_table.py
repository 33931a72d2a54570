"""The table that `redline serve` prints once its engine is up."""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.config import ABLATIONS, EngineConfig, watermark_blocks
from engine.text import human_bytes


def show_start(console: Console, engine: Any) -> None:
    """Print the resolved settings: model, memory, capacity, and the time of each start phase."""
    table = Table(title=f"Redline serves {engine.config.name}", title_justify="left", show_header=False, box=None)
    for what, value, flag in start_rows(engine):
        table.add_row(what, value, Text(flag, style="dim"))
    console.print(table)
    for warning in engine.warnings:
        console.print(f"warning: {warning}")


def start_fields(engine: Any) -> dict[str, Any]:
    """The same for a log of JSON lines."""
    rows = {what.strip(): value for what, value, _ in start_rows(engine)}
    return {"settings": rows, "warnings": list(engine.warnings)}


def start_rows(engine: Any) -> list[tuple[str, str, str]]:
    """The resolved settings: name, value, and the flag that changes it."""
    ready = engine.ready
    return [
        ("model path", ready.model_path, ""),
        *replicas(engine.config),
        ("device", ready.device, "--device"),
        ("dtype", ready.dtype, "--dtype"),
        *quantized(ready),
        ("kernels", ready.kernels, "--kernels"),
        *([("measured tiles", ready.tile_table, "--tile-table")] if ready.tile_table else []),
        *((line.what, human_bytes(line.bytes), line.flag) for line in ready.memory),
        *kv_blocks(ready),
        *kv_groups(ready),
        *inputs(engine),
        *pooling(ready),
        ("maximum request length", f"{ready.max_model_len:,} tokens", "--max-model-len"),
        ("requests of that length", f"{ready.sequences:,} at once", "--kv-cache-memory-bytes, --max-num-seqs"),
        ("running requests", f"at most {ready.max_num_seqs:,}", "--max-num-seqs"),
        token_budget(ready),
        ("prefix caching", "on" if ready.prefix_caching else "off", "--no-enable-prefix-caching"),
        *sampling_defaults(engine),
        *baseline(engine.config, ready),
    ]


def token_budget(ready: Any) -> tuple[str, str, str]:
    """The line for the tokens of a step, and why they are so many."""
    source = f" ({ready.budget_source})" if ready.budget_source else ""
    return "token budget", f"{ready.max_num_batched_tokens:,} tokens per step{source}", "--max-num-batched-tokens"


def pooling(ready: Any) -> list[tuple[str, str, str]]:
    """The line for what a model that pools returns."""
    spec = ready.pooling
    if spec is None:
        return []
    if spec.task == "classify":
        what = "a score of a pair of texts" + (", sigmoid" if spec.activation == "sigmoid" else "")
        return [("returns", what, "--runner, --convert")]
    length = ", normalized" if spec.normalize else ""
    what = f"embeddings of {spec.width:,} numbers, {spec.method} pooling{length}"
    return [("returns", what, "--runner, --pooler-config")]


def sampling_defaults(engine: Any) -> list[tuple[str, str, str]]:
    """The line for sampling defaults of the model, if it has any."""
    values = ", ".join(f"{name} {value:g}" for name, value in engine.generation.sampling.items())
    return [("sampling defaults", values, "--generation-config")] if values else []


def replicas(config: EngineConfig) -> list[tuple[str, str, str]]:
    """The line for several replicas, if there are several."""
    count = config.data_parallel_size
    if count == 1:
        return []
    flags = "--dp, --routing"
    roles = ""
    if config.prefill_replicas:
        roles = f" ({config.prefill_replicas} for prompts, {config.decode_replicas} for outputs)"
        flags = "--prefill-replicas, --decode-replicas, --routing"
    return [("replicas", f"{count}{roles}, routing {config.routing}; the values below are per replica", flags)]


def inputs(engine: Any) -> list[tuple[str, str, str]]:
    """Lines for how multimodal inputs are processed, if the model takes any and the core does not process them."""
    if engine.mm is None:
        return []
    processes, size = engine.mm.processes, engine.mm.cache_bytes
    return [
        ("feature cache", f"at most {human_bytes(size)} of shared memory" if size else "off", "--mm-cache-gb"),
        ("processing of inputs", f"{processes} process{'es' if processes > 1 else ''}", "--mm-processors"),
    ]


def quantized(ready: Any) -> list[tuple[str, str, str]]:
    """Lines for quantized weights and a quantized KV cache, if there are any."""
    lines = []
    if ready.quantization:
        head = "; the head int8" if ready.quantization == "int4" else ""
        lines.append(("linear layers", ready.quantization + head, "--quantization"))
    if ready.kv_cache_dtype:
        lines.append(("keys and values", ready.kv_cache_dtype, "--kv-cache-dtype"))
    return lines


def baseline(config: EngineConfig, ready: Any) -> list[tuple[str, str, str]]:
    """Lines for what differs from V1: none for V1 itself."""
    lines = []
    if config.engine == "v0":
        budget = f"token budget {ready.max_num_batched_tokens:,}"
        prefill = f"whole prompts, in steps without decodes, {budget}"
        if config.enable_chunked_prefill:
            prefill = f"prompts in chunks next to decodes, {budget}"
        lines.append(("engine", "V0 (emulated)", "--engine"))
        lines.append(("  prefill", prefill, "--enable-chunked-prefill"))
        steps = ready.scheduler_steps
        lines.append(
            ("  decode", f"{steps} step{'s' if steps > 1 else ''} per run of the scheduler", "--num-scheduler-steps")
        )
    elif config.ablations:
        lines.append(("engine", "V1, without:", "--ablate"))
    for name, what in ABLATIONS.items():
        if name in config.ablations:
            extra = (
                f" ({watermark_blocks(ready.num_blocks + 1):,} of {ready.num_blocks:,})" if name == "watermark" else ""
            )
            lines.append((f"  {name}", what + extra, ""))
    return lines


def kv_blocks(ready: Any) -> list[tuple[str, str, str]]:
    """The line for the blocks of the KV cache; encoders have none."""
    if not ready.kv_windows:
        return []
    return [("KV cache blocks", f"{ready.num_blocks:,} of {ready.block_size} tokens each", "--block-size")]


def kv_groups(ready: Any) -> list[tuple[str, str, str]]:
    """The line for KV cache groups, if the model has sliding windows."""
    if not any(ready.kv_windows):
        return []
    groups = Counter(ready.kv_windows).items()
    sees = [
        f"{count} for the last {window:,} tokens" if window else f"{count} for all tokens" for window, count in groups
    ]
    return [("KV groups", ", ".join(sees), "")]
