"""Published measurements as cases to simulate: a line of the file is one figure, a case has all of a load."""

import csv
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from engine.hardware.step_time import DecoderShape

COLUMNS = ("model", "hw", "tp", "dtype", "engine", "version", "isl", "osl", "load_kind", "load_value", "source")
FIGURE = ("metric", "value", "unit")
HARDWARE = {"H100": "h100", "H200": "h200", "B200": "b200", "A100": "a100"}

# Layers, hidden size, intermediate size, heads, KV heads, head size, vocabulary; by the start of the name.
SHAPES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    r"Llama-2-7b": (32, 4096, 11008, 32, 32, 128, 32000),
    r"Llama-2-13b": (40, 5120, 13824, 40, 40, 128, 32000),
    r"Llama-2-70b": (80, 8192, 28672, 64, 8, 128, 32000),
    r"CodeLlama-34b": (48, 8192, 22016, 64, 8, 128, 32000),
    r"Llama-3(\.1)?-8B": (32, 4096, 14336, 32, 8, 128, 128256),
    r"Llama-3(\.1|\.3)?-70B": (80, 8192, 28672, 64, 8, 128, 128256),
    r"Llama-3\.1-405B": (126, 16384, 53248, 128, 8, 128, 128256),
    r"Llama-3\.2-1B": (16, 2048, 8192, 32, 8, 64, 128256),
    r"Llama-3\.2-3B": (28, 3072, 8192, 24, 8, 128, 128256),
    r"Mistral-7B": (32, 4096, 14336, 32, 8, 128, 32768),
    r"Mistral-Small-(24B|3)": (40, 5120, 32768, 32, 8, 128, 131072),
    r"Qwen2(\.5)?-7B": (28, 3584, 18944, 28, 4, 128, 152064),
    r"Qwen2(\.5)?-VL-7B": (28, 3584, 18944, 28, 4, 128, 152064),
    r"Qwen2\.5-14B": (48, 5120, 13824, 40, 8, 128, 152064),
    r"Qwen2\.5-32B": (64, 5120, 27648, 40, 8, 128, 152064),
    r"Qwen2(\.5)?-72B": (80, 8192, 29568, 64, 8, 128, 152064),
    r"Qwen3-0\.6B": (28, 1024, 3072, 16, 8, 128, 151936),
    r"Qwen3-1\.7B": (28, 2048, 6144, 16, 8, 128, 151936),
    r"Qwen3-4B": (36, 2560, 9728, 32, 8, 128, 151936),
    r"Qwen3-8B": (36, 4096, 12288, 32, 8, 128, 151936),
    r"Qwen3-14B": (40, 5120, 17408, 40, 8, 128, 151936),
    r"Qwen3-32B": (64, 5120, 25600, 64, 8, 128, 151936),
    r"phi-4": (40, 5120, 17920, 40, 10, 128, 100352),
}
EXPERTS = r"-A\d+B|Mixtral|DeepSeek|gpt-oss|Llama-4|GLM-4\.[5-9]|Kimi"
CLOSED, AT_ONCE, BY_RATE = ("max-concurrency", "concurrency"), ("burst-", "static-batch", "offline-"), ("qps",)
OFFLINE_REQUESTS = 2000  # of a load that is given as infinite
# Requests of ShareGPT as vLLM's benchmark reads them: the mean lengths that the rows themselves give.
SHAREGPT, SHAREGPT_LENGTHS = "sharegpt", (217, 201)


class NotSimulatedError(Exception):
    """Why a row has no simulation."""


@dataclass(frozen=True, slots=True)
class Case:
    """One load on one server.

    engine: a name in `tests.perf.sim_engines`, or v1 or v0. spread: lengths are uniform from this part of the length
    up to it; 0: exponential with it as the mean. load: closed, at-once or rate. value: concurrency, requests or
    requests/s.
    """

    engine: str
    version: str
    hardware: str
    model: str
    shape: DecoderShape
    ranks: int
    input: int
    output: int
    spread: float
    load: str
    value: float
    published: tuple[tuple[str, float], ...]  # by metric, in milliseconds or per second


@dataclass(frozen=True, slots=True)
class Skipped:
    """A load that isn't simulated, and how many figures it has."""

    what: str
    reason: str
    figures: int


def read_cases(path: Path) -> tuple[list[Case], list[Skipped]]:
    """The cases of a file, and what of it isn't simulated. Raises ValueError for a file with other columns."""
    groups: dict[tuple[str, ...], list[tuple[str, float]]] = defaultdict(list)
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := {*COLUMNS, *FIGURE} - set(reader.fieldnames or ()):
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
        for row in reader:
            scale = 1e3 if row["unit"] == "s" else 1.0
            metric = row["metric"].rstrip("~")
            groups[tuple(row[name] for name in COLUMNS)].append((metric, float(row["value"]) * scale))
    cases, skipped = [], []
    for key, figures in groups.items():
        row = dict(zip(COLUMNS, key, strict=True))
        try:
            cases.append(_case(row, tuple(figures)))
        except NotSimulatedError as reason:
            what = f"{row['model']}, {row['hw']}, {row['engine']} {row['version']}, {row['load_kind']}"
            skipped.append(Skipped(what, str(reason), len(figures)))
    return cases, skipped


def _case(row: dict[str, str], published: tuple[tuple[str, float], ...]) -> Case:
    hardware = HARDWARE.get(row["hw"].split("-")[0])
    if hardware is None:
        raise NotSimulatedError(f"no description of {row['hw']}")
    shape = _shape(row)
    load, value = _load(row)
    lengths, spread = _lengths(row)
    if "-VL-" in row["model"]:
        raise NotSimulatedError("the images of its load and their sizes are not in the file")
    if not row["tp"].isdigit():
        raise NotSimulatedError(f"{row['tp']} ranks")
    return Case(
        engine=_engine(row),
        version=row["version"],
        hardware=hardware,
        model=row["model"],
        shape=shape,
        ranks=int(row["tp"]),
        input=lengths[0],
        output=lengths[1],
        spread=spread,
        load=load,
        value=value,
        published=published,
    )


def _engine(row: dict[str, str]) -> str:
    if row["engine"] != "vllm":
        return "trtllm" if "trtllm" in row["engine"] else row["engine"]
    return "v0" if "V0" in row["version"] or re.match(r"0\.[1-6]\.", row["version"]) else "v1"


def _shape(row: dict[str, str]) -> DecoderShape:
    name = row["model"].split("/")[-1]
    if re.search(EXPERTS, name):
        raise NotSimulatedError("a mixture of experts")
    found = next((shape for pattern, shape in SHAPES.items() if re.match(pattern, name, re.IGNORECASE)), None)
    if found is None:
        raise NotSimulatedError("the shape of the model is not known")
    dtype = next((known for start, known in (("fp8", "fp8"), ("nvfp4", "fp4"), ("fp4", "fp4"), ("bf16", "bf16"),
                                             ("fp16", "bf16")) if row["dtype"].startswith(start)), None)  # fmt: skip
    if dtype is None:
        raise NotSimulatedError(f"weights in {row['dtype'] or 'an unknown dtype'}")
    # TensorRT-LLM's own tables of fp8 models have a quantized KV cache too.
    quantized_kv = dtype != "bf16" and ("kv fp8" in row["source"] or "perf-overview" in row["source"])
    return DecoderShape(*found, gemm_dtype=dtype, kv_dtype="fp8" if quantized_kv else "bf16")


def _load(row: dict[str, str]) -> tuple[str, float]:
    kind, value = row["load_kind"], row["load_value"]
    if kind in CLOSED:
        return "closed", float(value)
    if kind.startswith(AT_ONCE) or (kind in BY_RATE and value == "inf"):
        numbered = re.fullmatch(r"offline-(\d+)", kind)
        if numbered:
            return "at once", float(numbered[1])
        return "at once", OFFLINE_REQUESTS if value == "inf" else float(value)
    if kind in BY_RATE and value != "n/a":
        return "rate", float(value)
    raise NotSimulatedError(
        "the rate of requests is not in the file" if value == "n/a" else f"loads of the kind {kind}"
    )


def _lengths(row: dict[str, str]) -> tuple[tuple[int, int], float]:
    """Input and output tokens, and how they spread (see `Case`)."""
    if row["isl"].startswith(SHAREGPT):
        means = [re.search(r"mean (\d+)", row[name]) for name in ("isl", "osl")]
        found = [int(mean[1]) if mean else usual for mean, usual in zip(means, SHAREGPT_LENGTHS, strict=True)]
        return (found[0], found[1]), 0.0
    if not (row["isl"].isdigit() and row["osl"].isdigit()):
        raise NotSimulatedError(f"the lengths of its requests are not in the file ({row['isl']}, {row['osl']})")
    ratio = re.search(r"random-range-ratio (0?\.\d+)", row["source"])
    return (int(row["isl"]), int(row["osl"])), float(ratio[1]) if ratio else 1.0
