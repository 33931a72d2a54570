"""What a run shows while it runs, and the table at its end."""

import math
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bench.point import PointPlan, PointState
from bench.results import Answer, PointRow


class Progress(Protocol):
    """Hears what a run does; called from the run's own thread, `point_tick` from inside the load generator's loop."""

    def message(self, text: str) -> None: ...

    def point_started(self, plan: PointPlan) -> None: ...

    def point_tick(self, plan: PointPlan, state: PointState) -> None: ...

    def point_finished(self, row: PointRow) -> None: ...

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        """What a sweep's run is at, in a few words; `point_…` concern the run named last."""
        ...


class QuietProgress:
    """Keeps messages and shows nothing."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def point_started(self, plan: PointPlan) -> None:
        pass

    def point_tick(self, plan: PointPlan, state: PointState) -> None:
        pass

    def point_finished(self, row: PointRow) -> None:
        pass

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        pass


class ConsoleProgress:
    """One line a load point on the terminal, below it the point under way."""

    def __init__(self, console: Console):
        self._console = console
        self._live: Live | None = None
        self._shown_s = -math.inf

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def point_started(self, plan: PointPlan) -> None:
        self._shown_s = -math.inf
        if self._console.is_terminal:
            # Refreshed by ticks alone: a thread that draws would take time from the load generator unasked.
            start = PointState(0.0, 0, 0, 0, 0, None)
            self._live = Live(_state_view(plan, start), console=self._console, auto_refresh=False, transient=True)
            self._live.start()

    def point_tick(self, plan: PointPlan, state: PointState) -> None:
        if self._live is not None and state.now_s >= self._shown_s + 0.5:
            self._shown_s = state.now_s
            self._live.update(_state_view(plan, state), refresh=True)

    def point_finished(self, row: PointRow) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        self._console.print(point_line(row), soft_wrap=True)

    def run_state(self, configuration: str, workload: str, state: str) -> None:
        pass


class SweepProgress(ConsoleProgress):
    """As above, and on a terminal the table of all runs, which stays in sight from the first server to the last."""

    def __init__(self, console: Console, configurations: Sequence[str], workloads: Sequence[str]):
        super().__init__(console)
        self._states = {c: dict.fromkeys(workloads, "waiting") for c in configurations}
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
        """Configurations down, workloads across, in each cell what the run is at."""
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
        if state.now_s >= self._shown_s + 0.5:
            self._shown_s = state.now_s
            self._show(_state_view(plan, state))

    def point_finished(self, row: PointRow) -> None:
        self._console.print(point_line(row), soft_wrap=True)
        self._show()

    def _show(self, *below: RenderableType) -> None:
        if self._live is not None:
            self._live.update(Group(Text(), self.table(), *below), refresh=True)


def point_line(row: PointRow) -> Text:
    """One load point in one line."""
    mark, style = ("✓", "green") if row.sustained else ("✗", "red") if row.sustained is False else ("?", "yellow")
    if row.concurrency is not None and row.valid:  # a closed loop judges no rate
        mark, style = "·", "default"
    text = Text(f"{mark} {row.phase:<7} {row.rate:>6.4g} req/s", style=style)
    text.append(f" {row.requests:>4} in {row.window_s:>3.0f} s", style="default")
    text.append(f"  TTFT {_ms(row.ttft_p50_ms)}  ITL {_ms(row.itl_p50_ms)} ms  ", style="default")
    text.append(row.reason, style="dim" if row.sustained else style)
    if row.disturbed:
        text.append(f"; disturbed: {row.disturbance}", style="yellow")
    return text


def _state_view(plan: PointPlan, state: PointState) -> Group:
    done, total = min(max(state.now_s, 0.0), plan.end_s), plan.end_s
    if plan.requests is not None:
        done, total = state.finished + state.failed, plan.requests
        line = f"{plan.concurrency} at a time · {done} of {total} requests · {max(state.now_s, 0.0):.0f} s"
    else:
        part = "warm-up" if state.now_s < plan.start_s else "window" if state.now_s < plan.end_s else "last answers"
        line = f"{plan.phase} {plan.rate:.4g} req/s · {part} · {state.now_s:.0f} of {plan.end_s:.0f} s"
    counts = f"sent {state.sent} · answering {state.first_token - state.finished} · finished {state.finished}"
    counts += f" · failed {state.failed}" if state.failed else ""
    server = state.server
    if server is not None:
        counts += f"   server: running {_count(server.running)} · waiting {_count(server.waiting)}"
        counts += f" · KV {server.kv_use:.0%}" if server.kv_use is not None else ""
        counts += f" · preemptions {_count(server.preemptions)}" if server.preemptions is not None else ""
    bar = ProgressBar(total=max(total, 1e-9), completed=done, width=40)
    return Group(Text(line, style="bold"), bar, Text(counts))


def points_table(rows: list[PointRow], title: str | None = None) -> Table:
    """Load points by rate, as printed at the end of a run; fits 80 columns in most cases.

    Columns for failed requests and for goodput only where there is something to show in them.
    """
    shown = sorted((r for r in rows if r.phase != "probe"), key=lambda r: (r.rate, r.started))
    with_goodput, with_failures = any(r.goodput is not None for r in shown), any(r.failures for r in shown)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in ("req/s", "sustained", "TTFT", "ITL", "TPOT", "E2E", "output", "preemp-"):
        table.add_column(name, justify="left" if name == "sustained" else "right", no_wrap=True)
    pair = "P50/P99 ms"
    for column, unit in zip(table.columns, ("", "", pair, pair, pair, pair, "tok/s", "tions"), strict=True):
        column.header = Text(f"{column.header}\n{unit}")
    if with_goodput:
        table.add_column(Text("goodput\nreq/s"), justify="right", no_wrap=True)
    if with_failures:
        table.add_column(Text("failed\nrequests"), justify="right", no_wrap=True)
    with_others = any(r.disturbed for r in shown)
    if with_others:
        table.add_column(Text("disturbed\nothers' CPU"), justify="right", no_wrap=True)
    for row in shown:
        more = [Text("–" if row.goodput is None else f"{row.goodput:.3g}")] if with_goodput else []
        if with_failures:
            more.append(Text(str(failed_requests(row)), style="red" if row.failures else ""))
        if with_others:
            others = (row.others_cpu_share or 0.0) + (row.steal_share or 0.0)
            more.append(Text(f"{others:.0%}" if row.disturbed else "–", style="yellow" if row.disturbed else ""))
        table.add_row(
            f"{row.rate:.4g}",
            _sustained(row),
            _pair(row.ttft_p50_ms, row.ttft_p99_ms),
            _pair(row.itl_p50_ms, row.itl_p99_ms),
            _pair(row.tpot_p50_ms, row.tpot_p99_ms),
            _pair(row.e2e_p50_ms, row.e2e_p99_ms),
            f"{row.output_tok_s:.0f}",
            _count(row.preemptions),
            *more,
            style="" if row.valid else "dim",
        )
    return table


def failed_requests(row: PointRow) -> int:
    """Requests of a load point that failed, its warm-up included."""
    return sum(int(kind.rpartition(":")[2]) for kind in row.failures.split(";") if kind)


def failure_words(row: PointRow) -> str:
    """The failures of a load point in words: "12 x http 429, 3 x connection"."""
    parts = [kind.rpartition(":") for kind in row.failures.split(";") if kind]
    return ", ".join(f"{count} × {kind}" for kind, _, count in parts)


def answer_text(answer: Answer) -> Text:
    return Text(answer.line(), style="bold")


def _sustained(row: PointRow) -> Text:
    if not row.valid:
        return Text("INVALID", style="bold yellow")
    if row.undecided:
        return Text("undecided", style="yellow")
    if row.sustained is None:
        return Text("–")  # a closed loop judges no rate
    return Text("yes", style="green") if row.sustained else Text("no", style="red")


def _pair(p50: float, p99: float) -> str:
    return f"{_ms(p50)}/{_ms(p99)}"


def _ms(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"
