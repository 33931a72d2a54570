"""What `redline plan` prints: its progress, and the table of deployments."""

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bench.planning.options import Candidate, PlanRequest
from bench.planning.rows import Row, metric_name, ordered
from engine.errors import ConfigError
from engine.hardware.accuracy import simulation_mark
from plots.simulated import error_text

_LONGEST_NOTE = 150


class Status:
    """Prints a line per finished candidate; on a terminal also those in progress."""

    def __init__(self, console: Console, candidates: Sequence[Candidate]):
        self._console, self._left = console, len(candidates)
        self._states: dict[str, str] = {}
        self._live: Live | None = None

    def __enter__(self) -> "Status":
        if self._console.is_terminal:
            self._live = Live(self._view(), console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, candidate: Candidate, state: str) -> None:
        """A few words about a candidate in progress."""
        self._states[candidate.name] = state
        self._refresh()

    def done(self, row: Row, line: str) -> None:
        """A candidate is finished."""
        self._states.pop(Candidate(row.hardware, row.tp).name, None)
        self._left -= 1
        self._console.print(line, soft_wrap=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._view(), refresh=True)

    def _view(self) -> Text:
        running = "   ".join(f"{name}: {state}" for name, state in self._states.items())
        return Text(f"{self._left} left   {running}", style="bold")


def row_line(row: Row) -> str:
    """A finished candidate in one line."""
    name = Candidate(row.hardware, row.tp).name
    if row.replicas is None:
        return f"{name}: {row.limited_by}: {_short(row.note)}"
    return f"{name}: {row.rate_per_replica:.3g} req/s per replica, {row.gpus} GPUs; limited by: {row.limited_by}"


def show_plan(console: Console, request: PlanRequest, rows: Sequence[Row], candidates: int, ended: str) -> None:
    """Print the table of all deployments that serve the load, and below it why others don't.

    Args:
        candidates: number of them.
        ended: how the plan ended before all of them were examined, in a word or two; "": it did not.
    """
    if not rows:
        return
    serving = [row for row in ordered(rows) if row.replicas is not None]
    console.print()
    if ended:
        console.print(f"{ended}: {len(rows)} of {candidates} are done; with --out, the same command continues")
    if serving:
        console.print(_table(request, serving))
    for row in ordered(rows):
        if row.replicas is None:
            console.print(row_line(row), soft_wrap=True, style="dim")
    simulated = dict.fromkeys((row.hardware, _engine(request, row)) for row in rows)
    for name, engine in simulated:
        if engine is None:
            continue
        console.print(error_text(simulation_mark(name, engine)), soft_wrap=True, style="yellow")


def _engine(request: PlanRequest, row: Row) -> str | None:
    """The engine that was simulated: v1 or v0; None: the flags of its server were refused."""
    from cli.simulated import parse_flags

    try:
        return parse_flags(request.model, Candidate(row.hardware, row.tp).flags(request)).engine
    except ConfigError:
        return None


def _table(request: PlanRequest, rows: Sequence[Row]) -> Table:
    priced = any(row.dollars_per_hour is not None for row in rows)
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("hardware", lambda row: row.title),
        ("TP", lambda row: str(row.tp)),
        ("DP", lambda row: str(row.replicas)),
        ("GPUs", lambda row: str(row.gpus)),
    ]
    if priced:
        columns += [
            ("$\nper hour", lambda row: _number(row.dollars_per_hour, ".2f")),
            ("$ per M\noutput", lambda row: _number(row.dollars_per_million_output, ".3g")),
            ("$ per M\ntokens", lambda row: _number(row.dollars_per_million_total, ".3g")),
        ]
    columns += [
        ("max req/s\nper replica", lambda row: _number(row.rate_per_replica, ".3g")),
        ("load\nper replica", lambda row: _number(row.load_per_replica, ".3g")),
        ("TTFT P99\nms", lambda row: _number(row.ttft_p99_ms, ".0f")),
        ("ITL P99\nms", lambda row: _number(row.itl_p99_ms, ".1f")),
        ("output\ntok/s", lambda row: _number(row.output_tok_s, ",.0f")),
        ("limited by", lambda row: row.limited_by),
    ]
    table = Table(title=_title(request), title_justify="left", title_style="bold", box=None, pad_edge=False)
    for heading, _ in columns:
        table.add_column(
            Text(heading), justify="left" if heading in ("hardware", "limited by") else "right", no_wrap=True
        )
    table.add_column("")
    for number, row in enumerate(rows):
        best = ("cheapest" if priced else "fewest GPUs") if number == 0 else ""
        table.add_row(*(cell(row) for _, cell in columns), best, style="bold green" if number == 0 else "")
    return table


def _title(request: PlanRequest) -> str:
    limits = ", ".join(f"{metric_name(column)} up to {limit:g} ms" for column, limit in request.limits.items())
    lengths = [str(request.workload[key]) for key in ("input", "output") if key in request.workload]
    workload = "/".join(lengths) if len(lengths) == 2 else str(request.workload.get("kind"))
    return f"{request.model}, {workload} at {request.rate:g} req/s{', ' if limits else ''}{limits}; simulated"


def _number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _short(note: str) -> str:
    return note if len(note) <= _LONGEST_NOTE else note[: _LONGEST_NOTE - 1] + "…"
