"""Options of `redline serve` about the engine: model, memory, scheduling, the V0 baseline, vLLM's names."""

import click

from cli.options import LENGTH, SIZE, Finite, JsonObject, option
from cli.vllm_options import VLLM
from engine.config import (
    ABLATIONS,
    DEVICES,
    DTYPE_ALIASES,
    DTYPES,
    ENGINES,
    KERNELS,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    MISTRAL,
    QUANTIZATIONS,
    ROUTINGS,
    SCHEDULING_POLICIES,
    SPECULATORS,
    STORED_QUANTIZATIONS,
    TOKENIZER_MODES,
)

MODEL, MEMORY = "Model", "Memory and scheduling"
BASELINE = "V0 baseline"


def split_commas(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Values of an option that may be repeated and may hold several with commas between."""
    names = (name.strip().replace("_", "-") for value in values for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


ENGINE_OPTIONS = (
    option(MODEL, "--model", "model_option", help="The model, instead of the argument."),
    option(MODEL, "--tokenizer", help="Folder of another tokenizer than the model's."),
    option(
        VLLM,
        "--generation-config",
        default="auto",
        show_default=True,
        metavar="auto|none|FOLDER",
        help="Whose generation_config.json gives the sampling defaults of requests: the model's, nobody's, a folder's.",
    ),
    option(
        VLLM,
        "--override-generation-config",
        type=JsonObject(),
        help="Sampling defaults that win over the file's, e.g. '{\"temperature\": 0.6}'.",
    ),
    option(
        VLLM,
        "--chat-template",
        metavar="FILE",
        help="A chat template in place of the model's: a file, or the template itself, in Jinja.",
    ),
    option(
        VLLM,
        "--hf-overrides",
        metavar="JSON",
        help="Fields of config.json to change, as a JSON object.",
    ),
    option(
        VLLM,
        "--rope-scaling",
        metavar="JSON",
        help="The field rope_scaling of config.json: scales the positions of the model to longer texts.",
    ),
    option(VLLM, "--rope-theta", type=Finite(0, min_open=True), help="The field rope_theta of config.json."),
    option(
        MODEL,
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice((*DTYPES, *DTYPE_ALIASES)),
        help="Of weights and activations.",
    ),
    option(
        MODEL,
        "--load-format",
        default="auto",
        show_default=True,
        type=click.Choice((*LOAD_FORMATS, MISTRAL)),
        help="Of the weights; mistral: as --tokenizer-mode mistral.",
    ),
    option(MODEL, "--num-layers", type=click.IntRange(1), help="With dummy weights: so many layers only."),
    option(
        MODEL,
        "--max-model-len",
        type=LENGTH,
        help="Tokens of one request, e.g. 4096 or 4K; auto: as memory suffices [default: the model's].",
    ),
    option(MODEL, "--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="What it runs on."),
    option(
        MODEL,
        "-q",
        "--quantization",
        type=click.Choice((*QUANTIZATIONS, *STORED_QUANTIZATIONS)),
        metavar="|".join(QUANTIZATIONS),
        help="Round the weights of the layers to so many bits, and products to int8 [default: as --dtype]. Names of "
        "formats (awq, gptq, fp8, …) check what the checkpoint is stored in.",
    ),
    option(
        MODEL,
        "--kv-cache-dtype",
        type=click.Choice(("auto", *KV_CACHE_DTYPES)),
        help="Of keys and values [default: as --dtype].",
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
        several=True,
        metavar="NAME=PATH",
        help="Adapters, served as the model NAME; may be repeated.",
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
        type=click.Choice(ENGINES),
        help="v0 does without all of what --ablate names [default: v1, or v0 with one of the two options below].",
    ),
    option(
        BASELINE,
        "--ablate",
        multiple=True,
        metavar="NAME,…",
        callback=split_commas,
        help=f"Take parts from V1: {', '.join(ABLATIONS)}.",
    ),
    option(BASELINE, "--num-scheduler-steps", type=int, help="V0's: steps for each time the scheduler runs."),
    option(
        BASELINE,
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        default=None,
        help="V0's: prompts in chunks, beside the decodes. V1 does that by itself.",
    ),
    option(
        VLLM,
        "--config-format",
        default="auto",
        type=click.Choice(("auto", "hf", MISTRAL)),
        help="mistral: as --tokenizer-mode mistral.",
    ),
    option(
        VLLM,
        "--tokenizer-mode",
        default="auto",
        show_default=True,
        type=click.Choice(TOKENIZER_MODES),
        help="mistral: a folder's params.json, consolidated.safetensors, tekken.json; auto: where nothing else is.",
    ),
)
