"""The configuration of an engine. The command line or the Python API makes it once; it never changes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from engine.disaggregation import check_disaggregation, count_replicas
from engine.errors import ConfigError
from engine.executor_backend import BACKEND_ALIASES, EXECUTOR_BACKENDS, MP, check_backend
from engine.json_options import read_overrides
from engine.kv_spill import check_kv_spill
from engine.media.limits import MediaOptions, make_limits, parse_per_prompt
from engine.pipeline_options import check_stages
from engine.pooling import CONVERSIONS, RUNNERS, check_pooler_config

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "safetensors", "gguf", "dummy"]
Device = Literal["auto", "cpu", "cuda", "xpu", "mps", "hpu"]  # but for auto: device types of torch

DTYPES: tuple[str, ...] = get_args(Dtype)
DTYPE_ALIASES = {"half": "float16", "float": "float32"}
LOAD_FORMATS: tuple[str, ...] = get_args(LoadFormat)
DEVICES: tuple[str, ...] = get_args(Device)
SIMULATED = "sim:"  # of a device, before the name of the hardware or the path of its description
SIMULATED_TOKENS: tuple[str, ...] = ("random", "echo")
KV_CACHE_DTYPES: tuple[str, ...] = ("int8", "fp8")
KV_CACHE_DTYPE_ALIASES = {"fp8_e4m3": "fp8"}
QUANTIZATIONS: tuple[str, ...] = ("int8", "int4", "fp8")
# Values of --quantization that name the format of the checkpoint, by the format. vLLM's names of kernels are accepted.
# fp8 is in both lists: devices that multiply in fp8 quantize to it, others check the checkpoint (`checks_stored`).
STORED_QUANTIZATIONS = {
    "awq": "awq",
    "awq_marlin": "awq",
    "gptq": "gptq",
    "gptq_marlin": "gptq",
    "compressed-tensors": "compressed-tensors",
    "fp8": "fp8",
    "fbgemm_fp8": "fbgemm-fp8",
}
AUTO_LENGTH = -1  # of max_model_len: the longest that fits in memory
MISTRAL = "mistral"
TOKENIZER_MODES: tuple[str, ...] = ("auto", "slow", MISTRAL)
# ISAs of the CPU, the kernels of GPUs, and those of all devices.
KERNELS: tuple[str, ...] = (
    "auto", "amx", "avx512-bf16", "avx512", "avx2", "neon-bf16", "neon-dotprod", "neon", "triton", "torch",
)  # fmt: skip

ENGINES: tuple[str, ...] = ("v1", "v0")
SPECULATORS: tuple[str, ...] = ("ngram",)
SCHEDULING_POLICIES: tuple[str, ...] = ("fcfs", "priority")
ROUTINGS: tuple[str, ...] = ("prefix", "least-loaded", "random")  # how requests are assigned to replicas

# Parts of V1 that V0 lacked or did differently. --ablate switches off some of them, --engine v0 all.
ABLATIONS: dict[str, str] = {
    "no-chunking": "a prompt is computed whole, in one step",
    "prefill-first": "no running request gets a token while prompts are computed",
    "no-run-ahead": "a step is scheduled only when the tokens of the previous one are known",
    "inline-frontend": "texts are tokenized and detokenized in the EngineCore's loop",
    "full-state": "each step sends the full state of every request to the workers",
    "no-prefix-cache": "no prefix caching",
    "inline-processing": "images, audio and video are decoded and processed in the EngineCore's loop",
    "no-feature-cache": "each multimodal input is processed anew for each request",
    "no-encoder-cache": "no encoder cache",
    "watermark": "1 % of the blocks stay free when a request is admitted",
    "driver-broadcast": "rank 0 alone receives steps, builds all inputs and broadcasts them",
}
CHUNKING = ("no-chunking", "prefill-first")  # not ablated in V0 with --enable-chunked-prefill
V0_OPTIONS = ("num_scheduler_steps", "enable_chunked_prefill")
INLINE_PROCESSING, NO_FEATURE_CACHE = "inline-processing", "no-feature-cache"
DRIVER_BROADCAST = "driver-broadcast"  # needs several ranks

INVARIANT_RANKS = 2  # the sum of two numbers does not depend on their order; sums of more do

KV_ALLOCATION = "--kv-cache-memory-bytes"

SHUTDOWN_TIMEOUT_S = 30.0  # for running requests to end; the grace period of a Kubernetes pod by default
STEP_TIMEOUT_S = 300.0  # of the watchdog; long enough for a long prompt on a slow machine


def window_blocks(window: int, tokens: int, block_size: int) -> int:
    """The most blocks that `tokens` consecutive tokens attend to; the window of each includes its own position."""
    return (window + tokens - 2) // block_size + 2


def watermark_blocks(num_blocks: int) -> int:
    """Blocks that V0 keeps free when it admits a request: 1 % of `num_blocks`, which includes the null block."""
    return num_blocks // 100


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The options of an engine. None: chosen from the model or the device (see `engine.memory`)."""

    model: str  # a short name, a folder, or a hub id
    tokenizer: str | None = None  # a folder; None: the model's own
    tokenizer_mode: str = "auto"  # of TOKENIZER_MODES; mistral: read Mistral's own files, weights too
    served_model_name: str | Sequence[str] | None = None  # one or several; responses show the first
    chat_template: str | None = None  # Jinja, in place of the model's
    hf_overrides: str | Mapping[str, Any] | None = None  # fields of config.json, or JSON text
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1  # stages, which divide the layers
    data_parallel_size: int = 1  # replicas behind one front end, which share cores and memory
    replica: int = 0  # the number of this one; set by engine.replicas
    prefill_replicas: int = 0  # of the replicas, those that only compute prompts; 0: each replica does everything
    decode_replicas: int = 0  # the others
    distributed_executor_backend: str = MP  # of EXECUTOR_BACKENDS
    ray_address: str | None = None  # HOST:PORT of the cluster's head; None: see engine.ray_cluster
    distribute_weights: bool = False  # nodes get the files of the model from this machine
    host_ranks: tuple[int, int] | None = None  # the rank with the first cores of a host, and how many; set by its links
    routing: str = "prefix"  # of ROUTINGS
    generation_config: str = "auto"  # source of sampling defaults: auto (the model), none, or a folder
    override_generation_config: dict[str, Any] | None = None  # fields that replace those of the file
    runner: str = "auto"  # of RUNNERS: generate texts, or pool hidden states into embeddings and scores
    convert: str = "auto"  # of CONVERSIONS: what a model that pools returns
    pooler_config: str | Mapping[str, Any] | None = None  # how hidden states become embeddings, or JSON text
    dtype: Dtype = "auto"
    max_model_len: int | None = None  # tokens of one request, prompt and output; or AUTO_LENGTH
    max_num_seqs: int | None = None  # most requests that run at the same time
    max_num_batched_tokens: int | None = None  # token budget of a step
    block_size: int | None = None  # tokens per KV block
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float | None = None  # fraction of the free memory that the engine may take
    enable_prefix_caching: bool = True
    kv_spill: str | None = None  # where evicted blocks stay, see engine.kv_spill; None: nowhere
    seed: int = 0
    load_format: LoadFormat = "auto"
    device: str = "auto"  # of DEVICES, or SIMULATED and the hardware
    simulated_tokens: str = "random"  # of SIMULATED_TOKENS: what simulated hardware samples
    kernels: str = "auto"  # of KERNELS
    tile_table: str | None = None  # a file, see engine.devices.tile_files; None: that of the GPU in the user's cache
    enforce_eager: bool = False  # GPUs launch the kernels of each step, none is captured in a CUDA graph
    deterministic: bool = False  # a request gets the same bits alone and in any batch; what cannot is refused
    quantization: str | None = None  # of QUANTIZATIONS or STORED_QUANTIZATIONS; None: as dtype
    stored_quantization: str | None = None  # the format the checkpoint must have; set from quantization
    kv_cache_dtype: str | None = None  # of KV_CACHE_DTYPES; None: as dtype
    num_layers: int | None = None  # with dummy weights: only the first layers
    scheduling_policy: str = "fcfs"
    speculative: str | None = None  # of SPECULATORS
    num_speculative_tokens: int = 4  # most draft tokens per request and step
    adapters: tuple[tuple[str, str], ...] = ()  # LoRA: names and folders
    engine: str | None = None  # of ENGINES; None: v1, or v0 if an option is given that only v0 has
    ablate: tuple[str, ...] = ()  # of ABLATIONS
    limit_mm_per_prompt: str | Mapping[str, Any] | None = (
        None  # most inputs of a prompt by kind; also `image=4,video=1`
    )
    allowed_local_media_path: str | None = None  # folder below which file: URLs of media may read
    allowed_media_domains: Sequence[str] = ()  # hosts that URLs of media may name; none: all
    allowed_media_networks: Sequence[str] = ()  # from which media may be fetched though they are not public
    media_limits: Mapping[str, Any] | None = None  # fields of engine.media.limits.MediaLimits that replace its defaults
    mm_processors: int | None = None  # processes for multimodal inputs, of all front ends; None: from the cores
    mm_cache_gb: float | None = None  # GiB of all feature caches; 0: none; None: see engine.multimodal.feature_files
    mm_processor_kwargs: str | Mapping[str, Any] | None = None  # options of the model's processor, or JSON text
    num_scheduler_steps: int | None = None  # v0 only: decode steps per run of the scheduler
    enable_chunked_prefill: bool | None = None  # v0 only; off by default

    def __post_init__(self) -> None:
        object.__setattr__(self, "ablate", tuple(self.ablate))  # messages carry lists
        object.__setattr__(self, "adapters", tuple((name, path) for name, path in self.adapters))
        if self.prefill_replicas or self.decode_replicas:
            count = count_replicas(self.prefill_replicas, self.decode_replicas, self.data_parallel_size)
            object.__setattr__(self, "data_parallel_size", count)
        self._normalize()
        names = [name for name, _ in self.adapters]
        if len({*names, *self.names}) < len(names) + len(self.names):
            raise ConfigError("--lora: adapter names must be unique and differ from the model's name")
        self._check_numbers()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed and not (name == "device" and self.simulated):
                raise ConfigError(
                    f"{flag(name)} must be one of {', '.join(filter(None, allowed))}, not {getattr(self, name)!r}"
                )
        self._check_engine()
        check_stages(self)
        if self.prefill_replicas:
            check_disaggregation(self)
        check_backend(self)

    def _check_numbers(self) -> None:
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} must be at least 1, not {value}")
        if self.max_model_len is not None and self.max_model_len < 1 and self.max_model_len != AUTO_LENGTH:
            raise ConfigError(f"--max-model-len must be at least 1, or auto, not {self.max_model_len}")
        if self.block_size is not None and (self.block_size < 1 or self.block_size & (self.block_size - 1)):
            raise ConfigError(f"--block-size must be a power of two, not {self.block_size}")
        if not 0 <= self.replica < self.data_parallel_size:
            raise ConfigError(f"replica must be below --dp ({self.data_parallel_size}), not {self.replica}")
        fraction = self.gpu_memory_utilization
        if fraction is not None and not 0 < fraction <= 1:
            raise ConfigError(f"--gpu-memory-utilization must lie in (0, 1], not {fraction}")
        if self.mm_cache_gb is not None and not 0 <= self.mm_cache_gb < math.inf:
            raise ConfigError(f"--mm-cache-gb must be at least 0, not {self.mm_cache_gb:g}")
        if self.kv_cache_memory_bytes is not None and self.kv_cache_memory_bytes < 1:
            raise ConfigError(f"{KV_ALLOCATION} must be at least 1, not {self.kv_cache_memory_bytes}")
        slots, budget = self.max_num_seqs, self.max_num_batched_tokens
        if slots is not None and budget is not None and budget < slots:
            raise ConfigError(
                f"--max-num-batched-tokens ({budget}) must not be below --max-num-seqs ({slots}): "
                "each running request needs one token a step"
            )

    def _normalize(self) -> None:
        """Map aliases to one value."""
        given = self.served_model_name
        names = () if given is None else (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
        if not all(names):
            raise ConfigError("--served-model-name must not be empty")
        object.__setattr__(self, "served_model_name", names or None)
        object.__setattr__(self, "dtype", DTYPE_ALIASES.get(self.dtype, self.dtype))
        backend = self.distributed_executor_backend
        object.__setattr__(self, "distributed_executor_backend", BACKEND_ALIASES.get(backend, backend))
        if self.kv_cache_dtype == "auto":
            object.__setattr__(self, "kv_cache_dtype", None)
        if self.kv_cache_dtype in KV_CACHE_DTYPE_ALIASES:
            object.__setattr__(self, "kv_cache_dtype", KV_CACHE_DTYPE_ALIASES[self.kv_cache_dtype])
        if self.quantization in STORED_QUANTIZATIONS and self.quantization not in QUANTIZATIONS:
            object.__setattr__(self, "stored_quantization", STORED_QUANTIZATIONS[self.quantization])
            object.__setattr__(self, "quantization", None)
        if isinstance(self.hf_overrides, str):
            object.__setattr__(self, "hf_overrides", read_overrides(self.hf_overrides))
        object.__setattr__(self, "limit_mm_per_prompt", parse_per_prompt(self.limit_mm_per_prompt))
        for name in ("allowed_media_domains", "allowed_media_networks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self.media_options.check()
        if isinstance(self.mm_processor_kwargs, str):
            kwargs = read_overrides(self.mm_processor_kwargs, "--mm-processor-kwargs")
            object.__setattr__(self, "mm_processor_kwargs", kwargs)
        if isinstance(self.pooler_config, str):
            object.__setattr__(self, "pooler_config", read_overrides(self.pooler_config, "--pooler-config"))
        assert not isinstance(self.pooler_config, str)
        check_pooler_config(self.pooler_config or {})
        if self.engine is None:
            object.__setattr__(self, "engine", "v0" if self.v0_options else "v1")

    @property
    def per_prompt(self) -> dict[str, int]:
        """The most inputs of a prompt by kind; other kinds have no limit."""
        return parse_per_prompt(self.limit_mm_per_prompt)

    @property
    def media_options(self) -> MediaOptions:
        """Where media of requests may come from, and their limits."""
        return MediaOptions(
            local_path=self.allowed_local_media_path or "",
            domains=tuple(self.allowed_media_domains),
            networks=tuple(self.allowed_media_networks),
            limits=make_limits(self.media_limits or {}),
        )

    def checks_stored(self) -> "EngineConfig":
        """The configuration on devices that don't quantize to fp8: `--quantization fp8` only checks the checkpoint."""
        if self.quantization != "fp8":
            return self
        return dataclasses.replace(self, quantization=None, stored_quantization=STORED_QUANTIZATIONS["fp8"])

    @property
    def v0_options(self) -> tuple[str, ...]:
        """The flags of the options that were given and that only V0 has."""
        return tuple(flag(name) for name in V0_OPTIONS if getattr(self, name) is not None)

    def _check_engine(self) -> None:
        if self.simulated_tokens != SIMULATED_TOKENS[0] and not self.simulated:
            raise ConfigError(f"--simulated-tokens needs a simulated device: give --device {SIMULATED}NAME")
        for ablation in self.ablate:
            if ablation not in ABLATIONS:
                raise ConfigError(f"--ablate must be one of {', '.join(ABLATIONS)}, not {ablation!r}")
        cached = self.enable_prefix_caching and "no-prefix-cache" not in self.ablations
        driven = DRIVER_BROADCAST in self.ablations
        check_kv_spill(self.kv_spill, simulated=bool(self.simulated), prefix_caching=cached, driven=driven)
        if self.engine == "v1" and self.num_scheduler_steps is not None:
            raise ConfigError(
                "--num-scheduler-steps is an option of V0: V1 always schedules a step while the previous one runs, and "
                "several at once if no request waits (give --engine v0, or leave the flag out)"
            )
        if self.engine == "v1" and self.enable_chunked_prefill is not None:
            raise ConfigError(
                "--enable-chunked-prefill is an option of V0: V1 always computes prompts in chunks (--ablate "
                "no-chunking turns that off; give --engine v0, or leave the flag out)"
            )
        if self.engine == "v0" and self.ablate:
            raise ConfigError("--ablate switches off parts of V1; --engine v0 already switches off all of them")
        if self.deterministic and self.tensor_parallel_size > INVARIANT_RANKS:
            raise ConfigError(
                f"--deterministic does not work with --tp {self.tensor_parallel_size}: the size of the batch decides "
                f"in which order more than {INVARIANT_RANKS} ranks are added up; use --tp {INVARIANT_RANKS}, or --dp"
            )
        if DRIVER_BROADCAST in self.ablate and self.tensor_parallel_size == 1:
            raise ConfigError(
                f"--ablate {DRIVER_BROADCAST} needs --tp 2 or more: a single rank has no other rank to broadcast to"
            )
        if self.speculative and "full-state" in self.ablations:
            raise ConfigError(
                "--speculative does not work with --engine v0 or --ablate full-state: workers must keep request state"
            )
        if self.num_scheduler_steps is not None and self.num_scheduler_steps < 1:
            raise ConfigError(f"--num-scheduler-steps must be at least 1, not {self.num_scheduler_steps}")
        if (self.num_scheduler_steps or 1) > 1 and self.enable_chunked_prefill:
            raise ConfigError("--num-scheduler-steps and --enable-chunked-prefill exclude each other, as in V0")

    @property
    def ablations(self) -> frozenset[str]:
        """The parts of V1 that are switched off, by --ablate or by V0."""
        if self.engine == "v1":
            return frozenset(self.ablate)
        kept = {*(CHUNKING if self.enable_chunked_prefill else ())}
        if self.tensor_parallel_size == 1:
            kept.add(DRIVER_BROADCAST)
        return frozenset(ABLATIONS) - kept

    @property
    def simulated(self) -> str:
        """The hardware that is simulated (see `engine.hardware.description`); empty: the device is real."""
        return self.device.removeprefix(SIMULATED) if self.device.startswith(SIMULATED) else ""

    @property
    def num_ranks(self) -> int:
        """The number of ranks of a replica: those of the first pipeline stage, then those of the next."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def answering_rank(self) -> int:
        """The rank whose results the executor gets: the first one of the last stage, which samples."""
        return self.num_ranks - self.tensor_parallel_size

    @property
    def total_ranks(self) -> int:
        """The number of ranks that share the cores: those of all replicas, or those on the rank's host."""
        if self.host_ranks is not None:
            return self.host_ranks[1]
        return self.data_parallel_size * self.num_ranks

    @property
    def first_rank(self) -> int:
        """The number of this replica's first rank, counted over all ranks that share the cores."""
        if self.host_ranks is not None:
            return -self.host_ranks[0]
        return self.replica * self.num_ranks

    def describe(self) -> dict[str, Any]:
        """The fields as plain data."""
        return dataclasses.asdict(self)

    @property
    def name(self) -> str:
        """The name of the model in responses."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """All names that clients may use for the model."""
        given = self.served_model_name
        return (given,) if isinstance(given, str) else tuple(given or (self.model,))

    def fallback_note(self) -> str:
        """The warning that an option of V0 selected the V0 engine."""
        chosen = " and ".join(self.v0_options)
        return (
            f"{chosen}: an option of V0, so this engine runs as --engine v0 (V1 always does both; leave the option out)"
        )


_AT_LEAST_ONE = (
    "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "max_num_seqs", "max_num_batched_tokens",
    "num_layers", "num_speculative_tokens", "mm_processors",
)  # fmt: skip
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "dtype": DTYPES,
    "distributed_executor_backend": EXECUTOR_BACKENDS,
    "load_format": LOAD_FORMATS,
    "device": (*DEVICES, f"{SIMULATED}NAME"),
    "simulated_tokens": SIMULATED_TOKENS,
    "kernels": KERNELS,
    "quantization": (None, *QUANTIZATIONS),
    "tokenizer_mode": TOKENIZER_MODES,
    "kv_cache_dtype": (None, *KV_CACHE_DTYPES),
    "engine": ENGINES,
    "runner": RUNNERS,
    "convert": CONVERSIONS,
    "scheduling_policy": SCHEDULING_POLICIES,
    "routing": ROUTINGS,
    "speculative": (None, *SPECULATORS),
}


def flag(field: str) -> str:
    """The command-line flag of a field."""
    names = {
        "tensor_parallel_size": "--tp",
        "pipeline_parallel_size": "--pp",
        "data_parallel_size": "--dp",
        "kv_cache_memory_bytes": KV_ALLOCATION,
    }
    return names.get(field, "--" + field.replace("_", "-"))
