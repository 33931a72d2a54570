"""Options of `redline bench` about workload and arrivals, and what they resolve to."""

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bench.errors import BenchError
from bench.target.probe import ServerInfo
from bench.workloads import known_fields, needs_vocabulary
from bench.workloads.arrivals import KINDS, Arrivals
from bench.workloads.encoding import local_encoder, local_tokenizer, server_encoder, tokenizer_size
from bench.workloads.fields import MOST_TOKENS
from bench.workloads.images import FORMATS
from bench.workloads.presets import read_workload
from bench.workloads.traces import UNITS
from cli.options import Finite, option
from cli.params import LENGTH, REPEATS

if TYPE_CHECKING:
    from bench.target import Target
    from bench.workloads import Encode

# For a closed loop, which scripts use with any server: nearly every vocabulary has these ids.
ASSUMED_VOCABULARY = 10_000

# Parameter -> its flag, and the field of the workload that it sets.
_FIELDS = {
    "input_tokens": ("--input", "input"),
    "output_tokens": ("--output", "output"),
    "prefix": ("--prefix", "prefix"),
    "prefixes": ("--prefixes", "prefixes"),
    "turns": ("--turns", "turns"),
    "dataset": ("--dataset", "dataset"),
    "dataset_rows": ("--dataset-rows", "rows"),
    "images": ("--images", "images"),
    "image_size": ("--image-size", "image_size"),
    "image_format": ("--image-format", "image_format"),
    "repeat": ("--repeat", "repeat"),
    "skip_bad_rows": ("--skip-bad-rows", "skip_bad_rows"),
    "trace_unit": ("--trace-unit", "trace_unit"),
}

_COUNT = click.IntRange(1, MOST_TOKENS)
WORKLOAD, ARRIVALS = "Workload", "Arrivals"
WORKLOAD_OPTIONS = (
    option(
        WORKLOAD, "--workload", metavar="[NAME|FILE]", default_text="random prompts of --input and --output tokens",
        help="Workload to send, as the name of a preset or a YAML file. The presets are 500-2000, 2048-128, 6000-4000, "
        "shared-prefix, multi-turn, sharegpt, jsonl, images, visionarena, visionarena-bench, visionarena-sample, and "
        "mmmu-pro. "
        "The other options of this group replace single fields of the workload.",
    ),
    option(
        WORKLOAD, "--input", "input_tokens", type=LENGTH, metavar="TOKENS", default="500",
        help="Prompt length in tokens: N, or LOW:HIGH for a uniform distribution.",
    ),
    option(
        WORKLOAD, "--output", "output_tokens", type=LENGTH, metavar="TOKENS", default="100",
        help="Output length in tokens: N, or LOW:HIGH for a uniform distribution.",
    ),
    option(
        WORKLOAD, "--prefix", type=_COUNT, metavar="TOKENS", default_text="none",
        help="Length of a prefix that prompts share, in addition to --input. Set it to measure prefix caching.",
    ),
    option(
        WORKLOAD, "--prefixes", type=_COUNT, metavar="N", default=1,
        help="Number of different prefixes. Each prompt begins with one of them.",
    ),
    option(
        WORKLOAD, "--turns", type=_COUNT, metavar="N",
        help="Send conversations of this many turns instead of single prompts. Each request contains the history of "
        "its conversation; --input and --output are the lengths of one turn.",
    ),
    option(
        WORKLOAD, "--dataset", metavar="[PATH|ID]",
        help="Data set of a workload that needs one: a file, a folder or a hub id.",
    ),
    option(
        WORKLOAD, "--dataset-rows", type=_COUNT, metavar="N", default_text="set by the workload",
        help="Number of rows of the data set to use, from its beginning.",
    ),
    option(
        WORKLOAD, "--images", type=LENGTH, metavar="N", default_text="none",
        help="Send this many synthetic images with each request: N, or LOW:HIGH. No data set is needed.",
    ),
    option(
        WORKLOAD, "--image-size", metavar="WIDTHxHEIGHT,…", default_text="512x512",
        help="Size of synthetic images in pixels. Of several sizes, each image has one at random.",
    ),
    option(
        WORKLOAD, "--image-format", type=click.Choice(FORMATS), default_text="jpeg",
        help="Encoding of synthetic images.",
    ),
    option(
        WORKLOAD, "--repeat", type=REPEATS, metavar="PERCENT", default_text="0",
        help="Percentage of requests that repeat an earlier one with its images, to measure caches. Only for mmmu-pro "
        "and images. With --offline a list, such as 0,25,50,75,100.",
    ),
    option(
        ARRIVALS, "--arrivals", type=click.Choice(KINDS), default="poisson",
        help="Distribution of arrivals: poisson (independent), constant (equal intervals) or gamma (see --burstiness).",
    ),
    option(
        ARRIVALS, "--burstiness", type=Finite(0, min_open=True), metavar="SHAPE", default=1.0,
        help="Shape of the gamma distribution: 1 equals poisson, and smaller values send requests in bursts.",
    ),
    option(
        ARRIVALS, "--trace", metavar="FILE",
        help="Replay the arrivals and lengths of a recorded trace, at its own rate or scaled to --rate or --rates. "
        "--input and --output replace the lengths. Formats: Mooncake, Bailian, BurstGPT, Azure, or CSV or JSONL with a "
        "timestamp column and optional columns input_tokens and output_tokens.",
    ),
    option(
        ARRIVALS, "--trace-unit", type=click.Choice(("auto", *UNITS)), default="auto",
        help="Unit of the numeric timestamps of the trace. auto detects it from the format, the column name and the "
        "numbers.",
    ),
    option(
        ARRIVALS, "--skip-bad-rows", is_flag=True,
        help="Skip and report rows of --trace or --dataset that cannot be read, instead of ending with an error.",
    ),
)  # fmt: skip


def check_workload(ctx: click.Context) -> None:
    """Raise UsageError for flags that contradict each other."""
    params = ctx.params
    if params["prefix"] is None and params["workload"] is None and _is_set(ctx, "prefixes"):
        raise click.UsageError("--prefixes needs --prefix (the length of each prefix)")
    if params["trace"] is not None and _is_set(ctx, "arrivals"):
        raise click.UsageError("use --arrivals or --trace, not both")
    if params["trace"] is None and params["workload"] is None:
        for name in ("trace_unit", "skip_bad_rows"):
            if _is_set(ctx, name):
                raise click.UsageError(f"{_FIELDS[name][0]} needs --trace or --workload")
    if _is_set(ctx, "burstiness") and params["arrivals"] != "gamma":
        raise click.UsageError("--burstiness needs --arrivals gamma")
    if params["workload"] is None:
        _check_without_workload(ctx)


def _check_without_workload(ctx: click.Context) -> None:
    """Raise UsageError for flags that need --workload, or exclude --images."""
    images = ctx.params["images"]
    for name in ("dataset", "dataset_rows"):
        if _is_set(ctx, name):
            raise click.UsageError(f"{_FIELDS[name][0]} needs --workload")
    for name in ("image_size", "image_format", "repeat"):
        if _is_set(ctx, name) and images is None:
            raise click.UsageError(f"{_FIELDS[name][0]} needs --images or --workload")
    for name in ("prefix", "turns", "trace"):
        if images is not None and ctx.params[name] is not None:
            raise click.UsageError(f"use --images or --{name}, not both")


def workload_spec(ctx: click.Context) -> dict[str, Any]:
    """The description that make_workload() takes."""
    params = ctx.params
    if params["workload"] is not None:
        spec = read_workload(params["workload"])
    elif params["trace"] is not None and _uses_trace_lengths(ctx):
        spec = {"kind": "trace", "trace": params["trace"]}
    elif params["images"] is not None:
        spec = {"kind": "images"}
    else:
        kind = (
            "multi-turn" if params["turns"] is not None else "random" if params["prefix"] is None else "shared-prefix"
        )
        spec = {"kind": kind, "input": params["input_tokens"], "output": params["output_tokens"]}
        spec |= {"prefixes": params["prefixes"]} if kind == "shared-prefix" else {}
    known = known_fields(spec)
    for name, (flag, field) in _FIELDS.items():
        if _is_set(ctx, name):
            if field not in known and params["trace"] is not None and name in ("trace_unit", "skip_bad_rows"):
                continue  # these two then apply to the arrivals only
            if field not in known:
                raise click.UsageError(f"{flag} does not apply to a workload of kind {spec['kind']}")
            value = params[name]
            spec[field] = value[0] if name == "repeat" and isinstance(value, list) else value
    return spec


def _uses_trace_lengths(ctx: click.Context) -> bool:
    """Whether lengths come from the trace; raises BenchError if its columns do not show whether it has any."""
    params = ctx.params
    trace = arrivals_of(params).read_trace()
    if all(_is_set(ctx, name) for name in ("input_tokens", "output_tokens")):
        return False
    if trace.inputs is not None or trace.outputs is not None:
        return True
    if trace.unused and params["prefix"] is None and params["turns"] is None:
        raise BenchError(
            f"{params['trace']}: no known column has token counts (columns: {', '.join(trace.unused)}): pass --input "
            "and --output, or rename the columns to input_tokens and output_tokens (--trace)"
        )
    return False


def arrivals_of(params: dict[str, Any]) -> Arrivals:
    return Arrivals(*(params[name] for name in ("arrivals", "burstiness", "trace", "trace_unit", "skip_bad_rows")))


def rates_of(params: dict[str, Any]) -> list[float] | None:
    """The requested rates; a trace without one is replayed at its own rate. None: search."""
    if params["rate"] is not None:
        return [params["rate"]]
    if params["rates"] is None and params["trace"] is not None:
        return [arrivals_of(params).read_trace().rate]
    return params["rates"]


def vocabulary_of(params: dict[str, Any], spec: dict[str, Any], info: ServerInfo) -> int | None:
    """The vocabulary size, from a flag or from the server; None if the workload needs none."""
    if params["vocab_size"] is not None:
        return int(params["vocab_size"])
    if not needs_vocabulary(spec):
        return None
    if params["tokenizer"] is not None:
        return tokenizer_size(local_tokenizer(params["tokenizer"]))
    if info.vocab_size is None and params.get("concurrency") is not None:
        return ASSUMED_VOCABULARY
    if info.vocab_size is None:
        raise BenchError("the server does not report its vocabulary size: pass --vocab-size or --tokenizer")
    return info.vocab_size


def encoder_of(params: dict[str, Any], spec: dict[str, Any], target: "Target") -> "Encode":
    if params["tokenizer"] is not None and not needs_vocabulary(spec):
        return local_encoder(local_tokenizer(params["tokenizer"]))
    return server_encoder(target)


def _is_set(ctx: click.Context, name: str) -> bool:
    """Whether the option is on the command line."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
