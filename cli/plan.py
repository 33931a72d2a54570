"""`redline plan`: how many of which GPU serve a load within latency limits, from simulations."""

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bench.target.server import has_flag
from bench.workloads import ANY_VOCABULARY, make_workload
from bench.workloads.arrivals import MOST_RATE
from cli.exit_codes import FAILED
from cli.options import Finite, GroupedCommand, option, with_options
from cli.params import LIMIT, SHARE
from cli.screen import verbatim_console
from cli.workload import WORKLOAD_OPTIONS, arrivals_of, check_workload, workload_spec
from engine.errors import ConfigError
from engine.hardware.description import THIS_MACHINE, hardware_names, is_described, read_hardware
from engine.host import cores

if TYPE_CHECKING:
    from rich.console import Console

    from bench.planning.options import Candidate, PlanRequest
    from bench.planning.rows import Row

LOAD, DEPLOYMENTS, RESULTS = "Load and limits", "Deployments", "Results"
TPS = (1, 2, 4, 8)
LONGEST_COUNT = 4  # digits of a number of GPUs


class _HardwareNames(click.ParamType):
    """h100,ours.yaml -> ("h100", "ours.yaml")."""

    name = "a,b,c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else _words(value)
        for name in names:
            if not is_described(name):
                known = ", ".join((*hardware_names(), THIS_MACHINE))
                self.fail(f"no such hardware: {name!r}; known are {known}, or the path of a .yaml file", param, ctx)
        return tuple(names)


class _GpuCounts(click.ParamType):
    """1,2,4 -> (1, 2, 4)."""

    name = "n,n,n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = _words(value)
        if not words or not all(word.isdecimal() and len(word) <= LONGEST_COUNT and int(word) for word in words):
            self.fail(f"{value!r} is not a list of numbers of GPUs such as 1,2,4", param, ctx)
        return tuple(map(int, words))


def _words(value: Any) -> tuple[str, ...]:
    """The different words between commas."""
    return tuple(dict.fromkeys(word.strip() for word in str(value).split(",") if word.strip()))


class _Price(click.ParamType):
    """h100=2.5 -> ("h100", 2.5)."""

    name = "hardware=price"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        name, _, text = str(value).partition("=")
        try:
            price = float(text.removeprefix("$"))
        except ValueError:
            price = math.nan
        if not name or not 0 < price < math.inf:
            self.fail(
                f"{value!r} is not a price: use HARDWARE=DOLLARS, for an hour of one GPU, as h100=2.5", param, ctx
            )
        return name.strip(), price


PLAN_OPTIONS = (
    option(LOAD, "--model", metavar="MODEL", help="Model to serve. Its weights are not needed."),
    option(
        LOAD, "--rate", type=Finite(0, MOST_RATE, min_open=True), metavar="REQ/S",
        help="Request rate to serve.",
    ),
    option(
        LOAD, "--slo", "limits", type=LIMIT, multiple=True, metavar="METRIC=LIMIT",
        help="Latency limit, such as ttft_p99=2s or itl_p99=50ms. The metrics are ttft, itl, tpot and e2e, each with "
        "_p50 or _p99. May be repeated.",
    ),
    option(
        LOAD, "--precision", type=SHARE, metavar="PERCENT", default="10%",
        help="Relative precision of the rate of one replica. A finer precision takes longer.",
    ),
    option(LOAD, "--seed", type=int, metavar="N", default=0, help="Seed of arrival times and prompts."),
    option(
        DEPLOYMENTS, "--hardware", type=_HardwareNames(), metavar="NAME,…", default_text="all that is shipped",
        help="Hardware to consider: names, or files of descriptions.",
    ),
    option(
        DEPLOYMENTS, "--tp", type=_GpuCounts(), metavar="N,…", default=TPS, default_text="1,2,4,8",
        help="Numbers of GPUs of one replica to consider.",
    ),
    option(
        DEPLOYMENTS, "--price", "prices", type=_Price(), multiple=True, metavar="HARDWARE=DOLLARS",
        help="Price of one GPU for an hour, such as h100=2.5. May be repeated.",
    ),
    option(
        RESULTS, "--out", type=click.Path(file_okay=False, path_type=Path), metavar="FOLDER",
        default_text="none", help="Folder for plan.csv, plan.json and the load points. The same command continues an "
        "interrupted plan in it.",
    ),
    option(
        RESULTS, "--jobs", type=click.IntRange(1, 256), metavar="N", default_text="number of cores",
        help="Number of processes that simulate.",
    ),
)  # fmt: skip


@click.command(cls=GroupedCommand, context_settings={"max_content_width": 110})
@with_options(*PLAN_OPTIONS, *WORKLOAD_OPTIONS)
@click.argument("serve_flags", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVE_FLAGS]")
@click.pass_context
def command(ctx: click.Context, **params: Any) -> int:
    """Find out how many of which GPU serve a load within latency limits.

    Everything is simulated: for each hardware and number of GPUs, a search finds the rate that one replica sustains
    within the limits. Flags after -- are for the engine, as of redline serve.

    \b
    For example:
      redline plan --model llama-3.1-8b --input 500 --output 2000 --rate 40
        --slo ttft_p99=2s --slo itl_p99=50ms --price h100=2.5

    \b
    Exit codes:
      0  At least one deployment serves the load.
      1  None does, or an error ended the plan.
      2  A flag is wrong.
    """
    from bench.planning.options import Candidate

    request = _plan_request(ctx, params)
    hardware = params["hardware"] or tuple(hardware_names())
    for name in hardware:
        read_hardware(name)  # reports a wrong description before anything is simulated
    for name in request.prices:
        if name not in hardware:
            raise click.BadParameter(
                f"{name!r} is not among the hardware of this plan: {', '.join(hardware)}", param_hint="--price"
            )
    candidates = [Candidate(name, tp) for name in hardware for tp in params["tp"]]
    _check_flags(request, candidates)
    console = verbatim_console(file_width=140, highlight=False)
    rows = _examine(console, request, candidates, params)
    return 0 if any(row.replicas is not None for row in rows) else FAILED


def _plan_request(ctx: click.Context, params: dict[str, Any]) -> "PlanRequest":
    from bench.planning.options import PlanRequest

    for name in ("model", "rate"):
        if params[name] is None:
            raise click.UsageError(f"--{name} is needed: a plan is for one model at one request rate")
    check_workload(ctx)
    flags = list(params["serve_flags"])
    for names, instead in (
        (("--device",), "--hardware"),
        (("--tensor-parallel-size", "--tp", "-tp"), "--tp before --"),
    ):
        if any(has_flag(flags, name) for name in names):
            raise click.UsageError(f"{names[0]} does not belong behind --: use {instead}")
    if any(has_flag(flags, name) for name in ("--data-parallel-size", "--dp", "-dp")):
        raise click.UsageError("--data-parallel-size is what the plan finds: leave it out")
    spec = workload_spec(ctx)
    if not has_flag(flags, "--max-model-len"):
        flags += ["--max-model-len", str(math.ceil(1.1 * make_workload(spec, ANY_VOCABULARY).max_tokens))]
    return PlanRequest(
        model=params["model"], workload=spec, rate=params["rate"], limits=dict(params["limits"]), flags=tuple(flags),
        prices=dict(params["prices"]), precision=params["precision"], seed=params["seed"], arrivals=arrivals_of(params),
    )  # fmt: skip


def _check_flags(request: "PlanRequest", candidates: list["Candidate"]) -> None:
    """Raise ConfigError for flags of the engine that are wrong for every candidate, before processes are started."""
    from cli.simulated import parse_flags

    errors = []
    for candidate in candidates:
        try:
            parse_flags(request.model, candidate.flags(request))
        except ConfigError as error:
            errors.append(error)
        else:
            return
    raise errors[0]


def _examine(
    console: "Console", request: "PlanRequest", candidates: list["Candidate"], params: dict[str, Any]
) -> list["Row"]:
    """Show the progress, and in the end the table; that of the rows so far if it is interrupted."""
    from bench.planning.plan import make_plan
    from cli.plan_table import Status, row_line, show_plan
    from cli.simulated import make_engine

    rows: list[Row] = []
    status = Status(console, candidates)
    found = make_plan(
        request, candidates, make_engine, status.show, folder=params["out"], processes=params["jobs"] or cores()
    )
    ended = "ended by an error"
    try:
        with status, contextlib.closing(found):
            for row in found:
                rows.append(row)
                status.done(row, row_line(row))
        ended = ""
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        show_plan(console, request, rows, len(candidates), ended)
        if params["out"] is not None and rows:
            console.print(f"results: {params['out']}", soft_wrap=True)
    return rows
