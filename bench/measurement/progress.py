"""What a run prints: messages, the running load point, a line per load point, and the table at the end."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bench.measurement.load_point import PointPlan, PointState
from bench.results import Answer, PointRecord

_REDRAW_S = 0.5  # of real time, also where load points take virtual time


class Progress(Protocol):
    """Receives the progress of a run, in the run's thread; `point_tick` is called inside the load generator's loop."""

    def message(self, text: str) -> None: ...

    def point_started(self, plan: PointPlan) -> None: ...

    def point_tick(self, plan: PointPlan, state: PointState) -> None: ...

    def point_finished(self, record: PointRecord) -> None: ...

    def point_dropped(self) -> None:
        """The load point that was started is not measured."""
        ...

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        """The state of one run of a sweep, in a few words; later `point_…` calls belong to this run."""
        ...


class ConsoleProgress:
    """Prints one line per load point; on a terminal also the state of the running one."""

    def __init__(self, console: Console):
        self._console = console
        self._live: Live | None = None
        self._shown_s = -math.inf

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def point_started(self, plan: PointPlan) -> None:
        self._shown_s = -math.inf
        if self._console.is_terminal:
            # Refreshed by ticks only: a drawing thread would take time from the load generator.
            start = PointState(0.0, 0, 0, 0, 0, None)
            self._live = Live(_state_view(plan, start), console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def point_tick(self, plan: PointPlan, state: PointState) -> None:
        if self._live is not None and (now_s := time.monotonic()) >= self._shown_s + _REDRAW_S:
            self._shown_s = now_s
            self._live.update(_state_view(plan, state), refresh=True)

    def point_finished(self, record: PointRecord) -> None:
        self.point_dropped()
        self._console.print(point_line(record), soft_wrap=True)

    def point_dropped(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        pass


class SweepProgress(ConsoleProgress):
    """As ConsoleProgress; on a terminal it also shows the table of all runs during the whole sweep."""

    def __init__(self, console: Console, configurations: Sequence[str], runs: Mapping[str, Sequence[str]]):
        """`runs`: the configurations that are measured, by workload."""
        super().__init__(console)
        self._states = {c: {w: "waiting" if c in runs[w] else "–" for w in runs} for c in configurations}
        self._run = "", ""

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._live = Live(self.table(), console=self._console, auto_refresh=False, transient=True)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def table(self) -> Table:
        """One row per configuration, one column per workload; cells hold the state of the run."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("", *(next(iter(self._states.values()), {}))):
            table.add_column(Text(name), overflow="fold")
        for configuration, states in self._states.items():
            cells = [Text(s, style="bold cyan" if (configuration, w) == self._run else "") for w, s in states.items()]
            table.add_row(Text(configuration, style="bold"), *cells)
        return table

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        self._run = configuration, workload
        self._states[configuration][workload] = state
        self._show()

    def point_started(self, plan: PointPlan) -> None:
        self._shown_s = -math.inf
        configuration, workload = self._run
        self._states[configuration][workload] = f"{plan.phase} {plan.rate:.4g} req/s"
        self._show()

    def point_tick(self, plan: PointPlan, state: PointState) -> None:
        if (now_s := time.monotonic()) >= self._shown_s + _REDRAW_S:
            self._shown_s = now_s
            self._show(_state_view(plan, state))

    def point_finished(self, record: PointRecord) -> None:
        self._console.print(point_line(record), soft_wrap=True)
        self._show()

    def point_dropped(self) -> None:
        self._show()

    def _show(self, *below: RenderableType) -> None:
        if self._live is not None:
            self._live.update(Group(Text(), self.table(), *below), refresh=True)


def point_line(record: PointRecord) -> Text:
    """A load point as one line."""
    mark, style = ("✓", "green") if record.sustained else ("✗", "red") if record.sustained is False else ("?", "yellow")
    if record.concurrency is not None and record.valid:  # a closed loop has no verdict
        mark, style = "·", "default"
    text = Text(f"{mark} {record.phase:<7} {record.rate:>6.4g} req/s", style=style)
    text.append(f" {record.requests:>4} requests in {record.window_s:>3.0f} s", style="default")
    text.append(f"  P50 TTFT {_ms(record.ttft_p50_ms)} ms, ITL {_ms(record.itl_p50_ms)} ms  ", style="default")
    text.append(record.reason, style="dim" if record.sustained else style)
    if record.disturbed:
        text.append(f"; disturbed: {record.disturbance}", style="yellow")
    return text


def _state_view(plan: PointPlan, state: PointState) -> Group:
    done, total = min(max(state.now_s, 0.0), plan.end_s), plan.end_s
    if plan.requests is not None:
        done, total = state.finished + state.failed, plan.requests
        line = f"concurrency {plan.concurrency} · {done} of {total} requests · {max(state.now_s, 0.0):.0f} s"
    else:
        part = "warm-up" if state.now_s < plan.start_s else "window" if state.now_s < plan.end_s else "drain"
        line = f"{plan.phase} {plan.rate:.4g} req/s · {part} · {state.now_s:.0f} of {plan.end_s:.0f} s"
    counts = f"sent {state.sent} · streaming {state.first_token - state.finished} · finished {state.finished}"
    counts += f" · failed {state.failed}" if state.failed else ""
    server = state.server
    if server is not None:
        counts += f"   server: running {_count(server.running)} · waiting {_count(server.waiting)}"
        counts += f" · KV {server.kv_use:.0%}" if server.kv_use is not None else ""
        counts += f" · preemptions {_count(server.preemptions)}" if server.preemptions is not None else ""
    bar = ProgressBar(total=max(total, 1e-9), completed=done, width=40)
    return Group(Text(line, style="bold"), bar, Text(counts))


def points_table(records: list[PointRecord], title: str | None = None) -> Table:
    """Load points by rate, as printed at the end of a run; fits 80 columns in most cases.

    Goodput, energy, failed requests and other load get columns only if a load point has a value.
    """
    shown = sorted((r for r in records if r.phase != "probe"), key=lambda r: (r.rate, r.started))
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("req/s", "sustained", "TTFT", "ITL", "TPOT", "E2E", "output", "preemp-"):
        table.add_column(name, justify="left" if name == "sustained" else "right", no_wrap=True)
    pair = "P50/P99 ms"
    for column, unit in zip(table.columns, ("", "", pair, pair, pair, pair, "tok/s", "tions"), strict=True):
        column.header = Text(f"{column.header}\n{unit}")
    optional = _optional_columns(shown)
    for header, _ in optional:
        table.add_column(Text(header), justify="right", no_wrap=True)
    for record in shown:
        table.add_row(
            f"{record.rate:.4g}",
            _sustained(record),
            _pair(record.ttft_p50_ms, record.ttft_p99_ms),
            _pair(record.itl_p50_ms, record.itl_p99_ms),
            _pair(record.tpot_p50_ms, record.tpot_p99_ms),
            _pair(record.e2e_p50_ms, record.e2e_p99_ms),
            f"{record.output_tok_s:.0f}",
            _count(record.preemptions),
            *(cell(record) for _, cell in optional),
            style="" if record.valid else "dim",
        )
    return table


def _optional_columns(shown: list[PointRecord]) -> list[tuple[str, Callable[[PointRecord], Text]]]:
    """Headers and cells of the columns for which a load point has a value."""
    columns: list[tuple[str, Callable[[PointRecord], Text]]] = []
    if any(r.goodput is not None for r in shown):
        columns.append(("goodput\nreq/s", lambda r: Text(_significant(r.goodput))))
    if any(r.mean_power_w is not None for r in shown):
        columns.append(("energy\nJ/token", lambda r: Text(_significant(r.joules_per_output_token))))
        columns.append(("power\nW", lambda r: Text(_count(r.mean_power_w))))
    if any(r.failures for r in shown):
        columns.append(("failed\nrequests", lambda r: Text(str(r.failed_requests()), "red" if r.failures else "")))
    if any(r.disturbed for r in shown):
        columns.append(("disturbed\nothers' CPU", _others))
    return columns


def _others(record: PointRecord) -> Text:
    if not record.disturbed:
        return Text("–")
    return Text(f"{(record.others_cpu_share or 0.0) + (record.steal_share or 0.0):.0%}", style="yellow")


def duration(seconds: float) -> str:
    """A duration as text: 45 s, 8 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def answer_text(answer: Answer) -> Text:
    return Text(answer.line(), style="bold")


def _sustained(record: PointRecord) -> Text:
    if not record.valid:
        return Text("INVALID", style="bold yellow")
    if record.undecided:
        return Text("undecided", style="yellow")
    if record.sustained is None:
        return Text("–")  # a closed loop has no verdict
    return Text("yes", style="green") if record.sustained else Text("no", style="red")


def _pair(p50: float, p99: float) -> str:
    return f"{_ms(p50)}/{_ms(p99)}"


def _ms(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _significant(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
