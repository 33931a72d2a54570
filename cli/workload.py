"""Flags of `redline bench` that say what is sent and when, and what they amount to."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from bench.arrivals import KINDS, Arrivals
from bench.errors import BenchError
from bench.loadgen.probe import ServerFacts
from bench.presets import read_workload
from bench.traces import UNITS
from bench.workloads import known_fields, needs_vocabulary
from bench.workloads.encoding import local_encoder, local_tokenizer, server_encoder, tokenizer_size
from cli.options import Finite
from cli.params import LENGTH, MOST_TOKENS

if TYPE_CHECKING:
    from bench.loadgen import Target
    from bench.workloads import Encode

ASSUMED_VOCABULARY = 10_000  # closed loop, which scripts point at any server: ids that nearly every vocabulary has

# Flag -> field of the workload that it sets.
_FIELDS = {
    "input_tokens": ("--input", "input"),
    "output_tokens": ("--output", "output"),
    "prefix": ("--prefix", "prefix"),
    "prefixes": ("--prefixes", "prefixes"),
    "turns": ("--turns", "turns"),
    "dataset": ("--dataset", "dataset"),
    "dataset_rows": ("--dataset-rows", "rows"),
    "repeat": ("--repeat", "repeat"),
    "skip_bad_rows": ("--skip-bad-rows", "skip_bad_rows"),
    "trace_unit": ("--trace-unit", "trace_unit"),
}

_COUNT = click.IntRange(1, MOST_TOKENS)
_OPTIONS = (
    click.option(
        "--workload",
        metavar="NAME|FILE",
        help="A workload that ships with the product (500-2000, 2048-128, 6000-4000, shared-prefix, multi-turn, "
        "sharegpt, jsonl, visionarena, visionarena-sample, mmmu-pro, …) or a YAML file; the flags below change its "
        "fields.",
    ),
    click.option(
        "--input", "input_tokens", type=LENGTH, default="500", show_default=True, help="Prompt tokens: N or LOW:HIGH."
    ),
    click.option(
        "--output", "output_tokens", type=LENGTH, default="100", show_default=True, help="Tokens asked: N or LOW:HIGH."
    ),
    click.option("--prefix", type=_COUNT, help="Tokens of a shared prefix before each prompt."),
    click.option(
        "--prefixes",
        type=_COUNT,
        default=1,
        show_default=True,
        help="How many such prefixes there are.",
    ),
    click.option("--turns", type=_COUNT, help="Conversations of so many turns, each with its history."),
    click.option("--dataset", metavar="PATH|ID", help="Data of --workload: a file, a folder, or a hub id."),
    click.option("--dataset-rows", type=_COUNT, help="Rows of the data to use, the first ones."),
    click.option("--repeat", type=click.IntRange(0, 100), help="mmmu-pro: % of requests that send an earlier picture."),
    click.option(
        "--arrivals", type=click.Choice(KINDS), default="poisson", show_default=True, help="How requests arrive."
    ),
    click.option(
        "--burstiness",
        type=Finite(0, min_open=True),
        default=1.0,
        show_default=True,
        help="Shape of gamma arrivals: 1 is Poisson, smaller is burstier.",
    ),
    click.option(
        "--trace",
        metavar="FILE",
        help="Replay recorded requests, at their own rate or scaled to --rate or --rates: Mooncake, BurstGPT, Azure, "
        "or CSV or JSONL with timestamp, perhaps input_tokens and output_tokens.",
    ),
    click.option(
        "--trace-unit",
        type=click.Choice(("auto", *UNITS)),
        default="auto",
        show_default=True,
        help="Unit of the trace's times, where they are numbers.",
    ),
    click.option("--skip-bad-rows", is_flag=True, help="Leave out rows of --trace or --dataset that can't be read."),
)


def workload_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add these flags to a command, in this order."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def check_workload(ctx: click.Context) -> None:
    """Raise UsageError for flags that contradict each other."""
    given = ctx.params
    if given["prefix"] is None and given["workload"] is None and _said(ctx, "prefixes"):
        raise click.UsageError("--prefixes needs --prefix, the length of each")
    if given["trace"] is not None and _said(ctx, "arrivals"):
        raise click.UsageError("give either --arrivals or --trace")
    if given["trace"] is None and given["workload"] is None:
        for name in ("trace_unit", "skip_bad_rows"):
            if _said(ctx, name):
                raise click.UsageError(f"{_FIELDS[name][0]} needs --trace or --workload")
    if _said(ctx, "burstiness") and given["arrivals"] != "gamma":
        raise click.UsageError("--burstiness needs --arrivals gamma")
    if given["workload"] is None:
        for name in ("dataset", "dataset_rows", "repeat"):
            if _said(ctx, name):
                raise click.UsageError(f"{_FIELDS[name][0]} needs --workload, which says what the data is")


def workload_spec(ctx: click.Context) -> dict[str, Any]:
    """The description for make_workload()."""
    given = ctx.params
    if given["workload"] is not None:
        spec = read_workload(given["workload"])
    elif given["trace"] is not None and _lengths_of_trace(ctx):
        spec = {"kind": "trace", "trace": given["trace"]}
    else:
        kind = "multi-turn" if given["turns"] is not None else "random" if given["prefix"] is None else "shared-prefix"
        spec = {"kind": kind, "input": given["input_tokens"], "output": given["output_tokens"]}
        spec |= {"prefixes": given["prefixes"]} if kind == "shared-prefix" else {}
    known = known_fields(spec)
    for name, (flag, field) in _FIELDS.items():
        if _said(ctx, name):
            if field not in known and given["trace"] is not None and name in ("trace_unit", "skip_bad_rows"):
                continue  # they concern the arrivals alone
            if field not in known:
                raise click.UsageError(f"{flag} does not apply to a workload of the kind {spec['kind']}")
            spec[field] = given[name]
    return spec


def _lengths_of_trace(ctx: click.Context) -> bool:
    """Whether the trace gives lengths that no flag replaces; raises BenchError where its columns leave that open."""
    given = ctx.params
    recorded = arrivals_of(given).recorded()
    if all(_said(ctx, name) for name in ("input_tokens", "output_tokens")):
        return False
    if recorded.inputs is not None or recorded.outputs is not None:
        return True
    if recorded.unused and given["prefix"] is None and given["turns"] is None:
        raise BenchError(
            f"{given['trace']}: none of its columns {', '.join(recorded.unused)} is known as a number of tokens: give "
            "--input and --output, or call them input_tokens and output_tokens (--trace)"
        )
    return False


def arrivals_of(given: dict[str, Any]) -> Arrivals:
    return Arrivals(given["arrivals"], given["burstiness"], given["trace"], given["trace_unit"], given["skip_bad_rows"])


def rates_of(given: dict[str, Any]) -> list[float] | None:
    """The rates asked for; a trace without a rate is replayed at its own; None: search."""
    if given["rate"] is not None:
        return [given["rate"]]
    if given["rates"] is None and given["trace"] is not None:
        return [arrivals_of(given).recorded().rate]
    return given["rates"]


def vocabulary_of(given: dict[str, Any], spec: dict[str, Any], facts: ServerFacts) -> int | None:
    """The size of the vocabulary, from a flag or from the server; None where the workload needs none."""
    if given["vocab_size"] is not None:
        return int(given["vocab_size"])
    if not needs_vocabulary(spec):
        return None
    if given["tokenizer"] is not None:
        return tokenizer_size(local_tokenizer(given["tokenizer"]))
    if facts.vocab_size is None and given.get("concurrency") is not None:
        return ASSUMED_VOCABULARY
    if facts.vocab_size is None:
        raise BenchError("the server does not tell the size of its vocabulary: give --vocab-size or --tokenizer")
    return facts.vocab_size


def encoder_of(given: dict[str, Any], spec: dict[str, Any], target: "Target") -> "Encode":
    if given["tokenizer"] is not None and not needs_vocabulary(spec):
        return local_encoder(local_tokenizer(given["tokenizer"]))
    return server_encoder(target)


def _said(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
