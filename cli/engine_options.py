"""Options of `redline serve` for the engine: model, device, files, parallelism, scheduling, memory, V0 baseline."""

import click

from cli.options import LENGTH, SIZE, Finite, JsonObject, option
from engine.config import (
    ABLATIONS,
    DEVICES,
    DTYPE_ALIASES,
    DTYPES,
    ENGINES,
    KERNELS,
    KV_CACHE_DTYPE_ALIASES,
    KV_CACHE_DTYPES,
    LOAD_FORMATS,
    MISTRAL,
    QUANTIZATIONS,
    ROUTINGS,
    SCHEDULING_POLICIES,
    SIMULATED,
    SIMULATED_TOKENS,
    SPECULATORS,
    STORED_QUANTIZATIONS,
    TOKENIZER_MODES,
)
from engine.executor_backend import BACKEND_ALIASES, EXECUTOR_BACKENDS, MP
from engine.pooling import CONVERSIONS, RUNNERS

MODEL, DEVICE, MODEL_FILES = "Model", "Device and precision", "Model files"
PARALLEL, SCHEDULING, MEMORY, BASELINE = "Parallelism", "Scheduling", "Memory", "V0 baseline"


def split_commas(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Values of an option that may be repeated and may hold several names separated by commas."""
    names = (name.strip().replace("_", "-") for value in values for name in value.split(","))
    return tuple(dict.fromkeys(name for name in names if name))


class Device(click.ParamType):
    """One of DEVICES, or simulated hardware, whose name is checked when its description is read."""

    name = "device"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.startswith(SIMULATED):
            return str(click.Choice((*DEVICES, f"{SIMULATED}NAME")).convert(value, param, ctx))
        return value


ENGINE_OPTIONS = (
    option(MODEL, "--model", "model_option", metavar="MODEL", help="Model to serve, instead of the argument MODEL."),
    option(
        MODEL, "--tokenizer", metavar="MODEL", default_text="the model's",
        help="Another model whose tokenizer is used: a folder or a hub id.",
    ),
    option(
        MODEL, "--load-format", default="auto", type=click.Choice((*LOAD_FORMATS, MISTRAL)),
        help="Format of the weights. auto, safetensors and gguf detect it. dummy fills the model with random weights, "
        "to measure speed with only a config.json. mistral is the same as --tokenizer-mode mistral.",
    ),
    option(
        MODEL, "--num-layers", type=click.IntRange(1), metavar="N", default_text="all",
        help="Number of layers to keep, to measure a model that is too large for the machine. Needs --load-format "
        "dummy.",
    ),
    option(
        MODEL, "--max-model-len", type=LENGTH, metavar="TOKENS", default_text="the model's",
        help="Maximum number of tokens of a request, prompt and output together. auto takes as many as fit into "
        "memory. Lower it to fit more requests into the KV cache.",
    ),
    option(
        MODEL, "--runner", default="auto", type=click.Choice(RUNNERS),
        help="Whether the model generates texts or pools hidden states into embeddings or scores. auto pools with "
        "encoders, with classes named …Model or …ForSequenceClassification, and with folders of sentence-transformers.",
    ),
    option(
        MODEL, "--convert", default="auto", type=click.Choice(CONVERSIONS),
        help="What a model that pools returns: embeddings (embed) or the scores of its classification head (classify).",
    ),
    option(
        MODEL, "--pooler-config", type=JsonObject(), metavar="JSON", default_text="the model's",
        help="How hidden states become an embedding, such as '{\"pooling_type\": \"MEAN\", \"normalize\": false}'. "
        "Types are MEAN, CLS and LAST.",
    ),
    option(
        MODEL, "--lora", "--lora-modules", "lora", multiple=True, several=True, metavar="NAME=PATH…",
        help="LoRA adapters to serve, each as the model NAME.",
    ),
    option(
        MODEL, "--seed", default=0, type=int, metavar="N",
        help="Seed for the sampling of requests that set no seed.",
    ),
    option(
        DEVICE, "--device", default="auto", type=Device(), metavar=f"[{'|'.join(DEVICES)}|{SIMULATED}NAME]",
        help="Device that runs the model. auto takes a GPU (cuda, also AMD's) that PyTorch can use, else the CPU, "
        "which alone has been tested. sim:NAME simulates hardware such as h100, or that of a .yaml file: no weights, "
        "random tokens, its latencies.",
    ),
    option(
        DEVICE, "--simulated-tokens", default="random", type=click.Choice(SIMULATED_TOKENS),
        help="Tokens of sim:NAME: random ones, or those of the prompt.",
    ),
    option(
        DEVICE, "--kernels", default="auto", type=click.Choice(KERNELS), metavar="NAME",
        help="Kernels: of the CPU by instruction set (amx, avx512-bf16, avx512, avx2, neon-bf16, neon-dotprod, neon), "
        "triton on GPUs, torch on all devices, several times slower. auto takes the best that the device and the model "
        "support.",
    ),
    option(
        DEVICE, "--tile-table", type=click.Path(dir_okay=False), metavar="FILE",
        default_text="the GPU's",
        help="Tiles of attention, from `redline profile --tune`.",
    ),
    option(
        DEVICE, "--enforce-eager/--no-enforce-eager", default=False,
        help="Launch the kernels of each step one by one on GPUs, instead of capturing steps in CUDA graphs. The CPU "
        "captures none.",
    ),
    option(
        DEVICE, "--dtype", default="auto", type=click.Choice((*DTYPES, *DTYPE_ALIASES)),
        help="Data type of weights and activations. auto takes the checkpoint's, half is float16, float is float32. "
        "The C++ kernels do not support float16.",
    ),
    option(
        DEVICE, "-q", "--quantization", type=click.Choice((*QUANTIZATIONS, *STORED_QUANTIZATIONS)),
        metavar="[int8|int4|fp8]", default_text="none",
        help="Quantize weights while loading, to fp8 on GPUs only. The names of checkpoint formats (awq, gptq, …) are "
        "accepted too, and only check that the checkpoint has this format.",
    ),
    option(
        DEVICE, "--kv-cache-dtype", type=click.Choice(("auto", *KV_CACHE_DTYPES, *KV_CACHE_DTYPE_ALIASES)),
        metavar="[auto|int8|fp8]", default_text="auto",
        help="Data type of the KV cache. auto equals --dtype. int8, and on GPUs fp8, fit nearly twice as many tokens "
        "into the same memory as bfloat16.",
    ),
    option(
        MODEL_FILES, "--generation-config", default="auto", metavar="[auto|none|FOLDER]",
        help="Source of the sampling defaults: the model's generation_config.json (auto), no defaults (none), or the "
        "generation_config.json of a folder.",
    ),
    option(
        MODEL_FILES, "--override-generation-config", type=JsonObject(), metavar="JSON",
        help="Sampling defaults that replace those of generation_config.json, such as '{\"temperature\": 0.6}'.",
    ),
    option(
        MODEL_FILES, "--chat-template", metavar="[FILE|TEMPLATE]", default_text="the model's",
        help="Chat template (Jinja) to use instead of the model's: a file, or the template itself.",
    ),
    option(
        MODEL_FILES, "--hf-overrides", metavar="JSON",
        help="Fields of config.json to replace, such as '{\"rope_theta\": 1000000}'.",
    ),
    option(
        MODEL_FILES, "--rope-scaling", metavar="JSON", default_text="the model's",
        help="Value of the field rope_scaling of config.json. It scales positions so that requests can be longer.",
    ),
    option(
        MODEL_FILES, "--rope-theta", type=Finite(0, min_open=True), metavar="NUMBER", default_text="the model's",
        help="Value of the field rope_theta of config.json, the base of the rotary embeddings.",
    ),
    option(
        MODEL_FILES, "--config-format", default="auto", type=click.Choice(("auto", "hf", MISTRAL)),
        help="Format of the configuration. auto and hf read config.json; mistral is the same as --tokenizer-mode "
        "mistral.",
    ),
    option(
        MODEL_FILES, "--tokenizer-mode", default="auto", type=click.Choice(TOKENIZER_MODES),
        help="Format of the model folder. mistral reads params.json, consolidated.safetensors and tekken.json. auto "
        "does so only if there is no config.json. slow has no effect.",
    ),
    option(
        PARALLEL, "-tp", "--tp", "--tensor-parallel-size", "tensor_parallel_size", default=1, type=int, metavar="N",
        help="Number of tensor-parallel ranks: processes that each compute a part of every layer.",
    ),
    option(
        PARALLEL, "-pp", "--pp", "--pipeline-parallel-size", "pipeline_parallel_size", default=1, type=int, metavar="N",
        help="Number of pipeline stages: processes that each compute some of the layers, --tp of them a stage.",
    ),
    option(
        PARALLEL, "-dp", "--dp", "--data-parallel-size", "data_parallel_size", default=1, type=int, metavar="N",
        help="Number of replicas of the model. Replicas share the cores and the memory of the machine; --max-num-seqs "
        "and --max-num-batched-tokens apply to each of them.",
    ),
    option(
        PARALLEL, "--prefill-replicas", default=0, type=int, metavar="P",
        help="Replicas that only compute prompts, for --decode-replicas D others that generate the outputs. They take "
        "the place of --dp P+D.",
    ),
    option(
        PARALLEL, "--decode-replicas", default=0, type=int, metavar="D",
        help="Replicas that continue the prompts computed by --prefill-replicas.",
    ),
    option(
        PARALLEL, "--distributed-executor-backend", default=MP,
        type=click.Choice((*EXECUTOR_BACKENDS, *BACKEND_ALIASES)), metavar=f"[{'|'.join(EXECUTOR_BACKENDS)}]",
        help="Where ranks, or replicas, run: on this machine (mp), or on the nodes of a Ray cluster (ray), of which it "
        "must be one.",
    ),
    option(
        PARALLEL, "--ray-address", metavar="HOST:PORT", default_text="RAY_ADDRESS, or the cluster of this machine",
        help="Head of the Ray cluster.",
    ),
    option(
        PARALLEL, "--distribute-weights/--no-distribute-weights", default=False,
        help="Send the files of the model to the Ray nodes that lack them. They are kept for later starts.",
    ),
    option(
        PARALLEL, "--routing", default="prefix", type=click.Choice(ROUTINGS),
        help="How requests are assigned to replicas. least-loaded takes the replica with the least work left; prefix "
        "also considers which prompt tokens a replica has in its prefix cache; random takes any.",
    ),
    option(
        SCHEDULING, "--max-num-seqs", type=SIZE, metavar="N", default_text="96, or the token budget if lower",
        help="Maximum number of requests that run at the same time. Raise it if requests wait although the KV cache "
        "has room.",
    ),
    option(
        SCHEDULING, "--max-num-batched-tokens", type=SIZE, metavar="TOKENS",
        default_text="--max-num-seqs + 16, at least 112; on AMX tiles up to 512",
        help="Token budget: maximum number of tokens that a step computes. A larger budget computes prompts in fewer "
        "steps, and each of these steps delays the running requests longer.",
    ),
    option(
        SCHEDULING, "--scheduling-policy", default="fcfs", type=click.Choice(SCHEDULING_POLICIES),
        help="Order of waiting requests: by arrival (fcfs), or by the priority that requests set, lowest first.",
    ),
    option(
        SCHEDULING, "--speculative", type=click.Choice(SPECULATORS), default_text="none",
        help="Speculative decoding. ngram proposes draft tokens from the text of the request itself, which speeds up "
        "greedy requests with repetitive text. The output does not change.",
    ),
    option(
        SCHEDULING, "--num-speculative-tokens", default=4, type=click.IntRange(1), metavar="N",
        help="Maximum number of draft tokens per request and step.",
    ),
    option(
        SCHEDULING, "--deterministic/--no-deterministic", default=False,
        help="Guarantee the same tokens and logprobs, bit for bit, whatever else is served: alone, in a batch, in "
        "chunks, after a preemption, from the prefix cache. Costs nothing; paths without this property are refused.",
    ),
    option(
        MEMORY, "--kv-cache-memory-bytes", type=SIZE, metavar="SIZE",
        default_text="what --gpu-memory-utilization leaves",
        help="Size of the KV cache, of all replicas together, such as 2GiB.",
    ),
    option(
        MEMORY, "--gpu-memory-utilization", type=Finite(0, 1, min_open=True), metavar="SHARE", default_text="0.5",
        help="Fraction of the free memory (0 to 1) that weights, workspace and KV cache may take together. On the CPU, "
        "this is main memory.",
    ),
    option(
        MEMORY, "--block-size", type=int, metavar="TOKENS", default_text="32",
        help="Tokens per KV cache block, a power of two. Only full blocks can be reused by prefix caching.",
    ),
    option(
        MEMORY, "--enable-prefix-caching/--no-enable-prefix-caching", default=True,
        help="Reuse the KV cache of earlier requests whose prompts begin with the same tokens.",
    ),
    option(
        MEMORY, "--kv-spill", metavar="host=SIZE[,disk=PATH:SIZE]", default_text="none",
        help="Keep KV cache blocks that are evicted in host memory, such as host=4GiB, and in files too, such as "
        "host=4GiB,disk=/path:50GiB. Prefix caching finds them there. Sizes are of all replicas together.",
    ),
    option(
        BASELINE, "--engine", type=click.Choice(ENGINES), default_text="v1, or v0 with one of its options below",
        help="Engine architecture of vLLM to follow. v0 is a baseline for comparisons: it switches off all parts of V1 "
        "that --ablate lists.",
    ),
    option(
        BASELINE, "--ablate", multiple=True, metavar="NAME,…", callback=split_commas, default_text="none",
        help=f"Parts of V1 to switch off, to measure what each contributes: {', '.join(ABLATIONS)}.",
    ),
    option(
        BASELINE, "--num-scheduler-steps", type=int, metavar="N", default_text="1",
        help="V0 only: number of decode steps per run of the scheduler.",
    ),
    option(
        BASELINE, "--enable-chunked-prefill/--no-enable-chunked-prefill", default=None, default_text="off",
        help="V0 only: compute prompts in chunks, in the same steps as decodes. V1 always does.",
    ),
)  # fmt: skip
