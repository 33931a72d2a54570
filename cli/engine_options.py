"""Options of `redline serve` about the engine: model, memory, scheduling, the V0 baseline, vLLM's names."""

import click

from cli.options import SIZE, Finite, JsonObject, option
from engine.config import (
    DEVICES,
    DTYPES,
    ENGINES,
    KERNELS,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    QUANTIZATIONS,
    REMOVALS,
    ROUTINGS,
    SCHEDULING_POLICIES,
    SPECULATORS,
    TOKENIZER_MODES,
)

MODEL, MEMORY = "Model", "Memory and scheduling"
BASELINE, ARTICLES = "V0 baseline", "Taken from vLLM's commands"


def split_commas(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Values of an option that may be repeated and may hold several with commas between."""
    names = (name.strip().replace("_", "-") for value in values for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


ENGINE_OPTIONS = (
    option(MODEL, "--model", "model_option", help="The model, instead of the argument."),
    option(MODEL, "--tokenizer", help="Folder of another tokenizer than the model's."),
    option(
        MODEL,
        "--generation-config",
        default="auto",
        show_default=True,
        metavar="auto|none|FOLDER",
        help="Whose generation_config.json gives the sampling defaults of requests: the model's, nobody's, a folder's.",
    ),
    option(
        MODEL,
        "--override-generation-config",
        type=JsonObject(),
        help="Sampling defaults that win over the file's, e.g. '{\"temperature\": 0.6}'.",
    ),
    option(
        MODEL,
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(DTYPES),
        help="Of weights and activations.",
    ),
    option(
        MODEL,
        "--load-format",
        default="auto",
        show_default=True,
        type=click.Choice(LOAD_FORMATS),
        help="Of the weights.",
    ),
    option(MODEL, "--num-layers", type=click.IntRange(1), help="With dummy weights: so many layers only."),
    option(MODEL, "--max-model-len", type=SIZE, help="Tokens of one request, e.g. 4096 or 4K [default: the model's]."),
    option(MODEL, "--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="What it runs on."),
    option(
        MODEL,
        "--quantization",
        type=click.Choice(QUANTIZATIONS),
        help="Round the weights of the layers to so many bits, and products to int8 [default: as --dtype].",
    ),
    option(
        MODEL, "--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), help="Of keys and values [default: as --dtype]."
    ),
    option(
        MODEL,
        "--kernels",
        default="auto",
        show_default=True,
        type=click.Choice(KERNELS),
        help="Instructions that the CPU's kernels may use; torch does without them, slowly.",
    ),
    option(
        MODEL,
        "-tp",
        "--tp",
        "--tensor-parallel-size",
        "tensor_parallel_size",
        default=1,
        show_default=True,
        type=int,
        help="Ranks that share the model.",
    ),
    option(
        MODEL,
        "-dp",
        "--dp",
        "--data-parallel-size",
        "data_parallel_size",
        default=1,
        show_default=True,
        type=int,
        help="Replicas of the model, which share cores and memory; rows and budget are those of each.",
    ),
    option(
        MODEL,
        "--routing",
        default="prefix",
        show_default=True,
        type=click.Choice(ROUTINGS),
        help="To which replica: who has less left to compute, counting a prefix in its cache; without that; or any.",
    ),
    option(
        MODEL,
        "--lora",
        "--lora-modules",
        "lora",
        multiple=True,
        metavar="NAME=PATH",
        help="An adapter, served as the model NAME; may be repeated, and more loaded while serving.",
    ),
    option(MODEL, "--seed", default=0, show_default=True, type=int, help="Of sampling, where a request gives none."),
    option(MEMORY, "--max-num-seqs", type=SIZE, help="Rows: requests that run at the same time."),
    option(MEMORY, "--max-num-batched-tokens", type=SIZE, help="The budget: tokens of one step."),
    option(MEMORY, "--block-size", type=int, help="Tokens of one block of KV cache, a power of two."),
    option(MEMORY, "--kv-cache-memory-bytes", type=SIZE, help="Size of the KV cache, of all replicas, e.g. 2GiB."),
    option(MEMORY, "--gpu-memory-utilization", type=Finite(), help="Share of the device's memory to use, 0 to 1."),
    option(
        MEMORY,
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=True,
        show_default=True,
        help="Reuse the KV cache of equal beginnings.",
    ),
    option(
        MEMORY,
        "--scheduling-policy",
        default="fcfs",
        show_default=True,
        type=click.Choice(SCHEDULING_POLICIES),
        help="Who gets a row first: who came first, or whose request says the lowest priority.",
    ),
    option(
        MEMORY,
        "--speculative",
        type=click.Choice(SPECULATORS),
        help="Guess tokens from what was said before and keep those the model confirms: the same text, sooner.",
    ),
    option(
        MEMORY,
        "--num-speculative-tokens",
        default=4,
        show_default=True,
        type=click.IntRange(1),
        help="Guesses a request gets in a step, at most.",
    ),
    option(
        BASELINE,
        "--engine",
        default="v1",
        show_default=True,
        type=click.Choice(ENGINES),
        help="v0 does without all of what --ablate names.",
    ),
    option(
        BASELINE,
        "--ablate",
        multiple=True,
        metavar="NAME,…",
        callback=split_commas,
        help=f"Take parts from V1: {', '.join(REMOVALS)}.",
    ),
    option(
        BASELINE, "--num-scheduler-steps", type=int, help="With --engine v0: steps for each time the scheduler runs."
    ),
    option(
        BASELINE,
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        default=None,
        help="With --engine v0: prompts in chunks, beside the decodes.",
    ),
    option(
        ARTICLES,
        "--tokenizer-mode",
        default="auto",
        show_default=True,
        type=click.Choice(TOKENIZER_MODES),
        help="mistral: a folder's params.json, consolidated.safetensors, tekken.json; auto: where nothing else is.",
    ),
    option(ARTICLES, "--limit-mm-per-prompt", metavar="KIND=N", help="Accepted; no model with images is served yet."),
)
