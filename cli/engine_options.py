"""Options of `redline serve` for the engine: model, memory, scheduling, the V0 baseline, options from vLLM."""

import click

from cli.options import LENGTH, SIZE, Finite, JsonObject, option
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

MODEL, MODEL_FILES, PARALLEL = "Model", "Model files", "Parallelism"
MEMORY = "Memory and scheduling"
BASELINE = "V0 baseline"


def split_commas(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Values of an option that may be repeated and may hold several names separated by commas."""
    names = (name.strip().replace("_", "-") for value in values for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


ENGINE_OPTIONS = (
    option(MODEL, "--model", "model_option", help="The model, if it is not given as the argument."),
    option(
        MODEL, "--tokenizer", help="Another model whose tokenizer is used: a folder or a hub id [default: the model's]."
    ),
    option(
        MODEL_FILES,
        "--generation-config",
        default="auto",
        show_default=True,
        metavar="auto|none|FOLDER",
        help="Source of the sampling defaults: the model's generation_config.json (auto), none, or that of a folder.",
    ),
    option(
        MODEL_FILES,
        "--override-generation-config",
        type=JsonObject(),
        help="Sampling defaults that replace those of the file, e.g. '{\"temperature\": 0.6}'.",
    ),
    option(
        MODEL_FILES,
        "--chat-template",
        metavar="FILE",
        help="Chat template (Jinja) that replaces the model's: a file, or the template itself.",
    ),
    option(
        MODEL_FILES,
        "--hf-overrides",
        metavar="JSON",
        help="Fields of config.json to change, as a JSON object.",
    ),
    option(
        MODEL_FILES,
        "--rope-scaling",
        metavar="JSON",
        help="The field rope_scaling of config.json, to extend the context length.",
    ),
    option(
        MODEL_FILES,
        "--rope-theta",
        type=Finite(0, min_open=True),
        help="The field rope_theta of config.json: the base of rotary embeddings.",
    ),
    option(
        MODEL,
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice((*DTYPES, *DTYPE_ALIASES)),
        help="Data type of weights and activations; auto: that of the checkpoint.",
    ),
    option(
        MODEL,
        "--load-format",
        default="auto",
        show_default=True,
        type=click.Choice((*LOAD_FORMATS, MISTRAL)),
        help="Format of the weights: auto detects it, dummy is random weights, mistral is --tokenizer-mode mistral.",
    ),
    option(
        MODEL,
        "--num-layers",
        type=click.IntRange(1),
        help="Number of layers to keep, so that a large shape fits (needs --load-format dummy) [default: all].",
    ),
    option(
        MODEL,
        "--max-model-len",
        type=LENGTH,
        help="Most tokens of a request, prompt and output, e.g. 4096 or 4K; auto: as many as memory allows. A lower "
        "length fits more requests into the KV cache [default: the model's].",
    ),
    option(MODEL, "--device", default="auto", show_default=True, type=click.Choice(DEVICES), help="Device to run on."),
    option(
        MODEL,
        "-q",
        "--quantization",
        type=click.Choice((*QUANTIZATIONS, *STORED_QUANTIZATIONS)),
        metavar="|".join(QUANTIZATIONS),
        help="Quantize weights while loading, and activations to int8 [default: none]. Names of formats (awq, gptq, "
        "fp8, …) check that the checkpoint is stored in that format.",
    ),
    option(
        MODEL,
        "--kv-cache-dtype",
        type=click.Choice(("auto", *KV_CACHE_DTYPES)),
        help="Data type of the KV cache; int8 nearly halves its size [default: as --dtype].",
    ),
    option(
        MODEL,
        "--kernels",
        default="auto",
        show_default=True,
        type=click.Choice(KERNELS),
        help="CPU kernels by instruction set; torch: PyTorch without them, several times slower.",
    ),
    option(
        MODEL,
        "--lora",
        "--lora-modules",
        "lora",
        multiple=True,
        several=True,
        metavar="NAME=PATH",
        help="LoRA adapter, served as the model NAME; may be repeated.",
    ),
    option(
        MODEL,
        "--seed",
        default=0,
        show_default=True,
        type=int,
        help="Seed of sampling for requests that give none.",
    ),
    option(
        PARALLEL,
        "-tp",
        "--tp",
        "--tensor-parallel-size",
        "tensor_parallel_size",
        default=1,
        show_default=True,
        type=int,
        help="Tensor-parallel ranks: processes that share the model.",
    ),
    option(
        PARALLEL,
        "-dp",
        "--dp",
        "--data-parallel-size",
        "data_parallel_size",
        default=1,
        show_default=True,
        type=int,
        help="Replicas of the model, which share cores and memory; --max-num-seqs and --max-num-batched-tokens are per "
        "replica.",
    ),
    option(
        PARALLEL,
        "--routing",
        default="prefix",
        show_default=True,
        type=click.Choice(ROUTINGS),
        help="How requests are assigned to replicas: by least work left, counting cached prefixes (prefix) or not "
        "(least-loaded), or at random.",
    ),
    option(
        MEMORY,
        "--max-num-seqs",
        type=SIZE,
        help="Most requests that run at the same time. Raise it if requests wait although the KV cache has room.",
    ),
    option(
        MEMORY,
        "--max-num-batched-tokens",
        type=SIZE,
        help="Token budget of a step. A larger budget computes prompts in fewer, longer steps.",
    ),
    option(MEMORY, "--block-size", type=int, help="Tokens per KV cache block; a power of two."),
    option(
        MEMORY,
        "--kv-cache-memory-bytes",
        type=SIZE,
        help="Size of the KV cache of all replicas together, e.g. 2GiB [default: "
        "what --gpu-memory-utilization leaves].",
    ),
    option(
        MEMORY,
        "--gpu-memory-utilization",
        type=Finite(0, 1, min_open=True),
        help="Share of the free memory that weights, workspace and KV cache may take [default: 0.5].",
    ),
    option(
        MEMORY,
        "--enable-prefix-caching/--no-enable-prefix-caching",
        default=True,
        show_default=True,
        help="Reuse the KV cache of prompts with the same beginning.",
    ),
    option(
        MEMORY,
        "--scheduling-policy",
        default="fcfs",
        show_default=True,
        type=click.Choice(SCHEDULING_POLICIES),
        help="Queue order: by arrival (fcfs), or by the request's priority, lowest first.",
    ),
    option(
        MEMORY,
        "--speculative",
        type=click.Choice(SPECULATORS),
        help="Speculative decoding: ngram proposes draft tokens from the request's own text. It does not change the "
        "output, and speeds up greedy requests with repetitive text.",
    ),
    option(
        MEMORY,
        "--num-speculative-tokens",
        default=4,
        show_default=True,
        type=click.IntRange(1),
        help="Most draft tokens per request and step.",
    ),
    option(
        BASELINE,
        "--engine",
        type=click.Choice(ENGINES),
        help="Engine generation of vLLM to follow; v0 switches off everything that --ablate names [default: v1, or v0 "
        "if --num-scheduler-steps or --enable-chunked-prefill is given].",
    ),
    option(
        BASELINE,
        "--ablate",
        multiple=True,
        metavar="NAME,…",
        callback=split_commas,
        help=f"Parts of V1 to switch off: {', '.join(ABLATIONS)}.",
    ),
    option(BASELINE, "--num-scheduler-steps", type=int, help="V0 only: decode steps per run of the scheduler."),
    option(
        BASELINE,
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        default=None,
        help="V0 only: compute prompts in chunks next to decodes. V1 always does.",
    ),
    option(
        MODEL_FILES,
        "--config-format",
        default="auto",
        type=click.Choice(("auto", "hf", MISTRAL)),
        help="Format of the configuration: auto and hf read config.json, mistral is --tokenizer-mode mistral.",
    ),
    option(
        MODEL_FILES,
        "--tokenizer-mode",
        default="auto",
        show_default=True,
        type=click.Choice(TOKENIZER_MODES),
        help="Format of the model folder: mistral reads params.json, consolidated.safetensors and tekken.json; auto "
        "does so only if there is no config.json.",
    ),
)
