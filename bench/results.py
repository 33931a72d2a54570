"""Result files: one row a request, one row a load point, one summary a run.

results/NAME/
    summary.json                 versions, hardware, seed, configurations, one answer a (configuration, workload)
    points.csv                   one row a load point, columns of PointRow
    requests/POINT_ID.parquet    one row a request, columns of RequestRow
    metrics/POINT_ID.parquet     one row a reading of the server's metrics, columns of ServerState; if it has any
"""

import csv
import dataclasses
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_type_hints

import pandas as pd

from bench.files import CannotWriteError, replace_file, writing
from engine.host import cores, total_memory

Phase = Literal["probe", "search", "confirm", "ladder", "fixed", "closed"]

POINTS_FILE = "points.csv"
SUMMARY_FILE = "summary.json"
REQUESTS_FOLDER = "requests"
METRICS_FOLDER = "metrics"
FLAG = "--out"
DISTURBED_SHARE = 0.1  # of the cores: what others use beyond it may be seen in the figures

# Student's t for 95 %, by degrees of freedom.
_STUDENT_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of a few runs, at least three (Student's t)."""
    n = len(values)
    return _STUDENT_T.get(n - 1, _STUDENT_T[9]) * statistics.stdev(values) / math.sqrt(n)


@dataclass(slots=True)
class RequestRow:
    """One request of a load point; times in seconds since the start of the point, from the intended send time on."""

    index: int
    intended_s: float
    sent_s: float
    ttft_s: float | None
    e2e_s: float | None
    input_tokens: int
    asked_output_tokens: int
    output_tokens: int
    cached_tokens: int
    in_window: bool
    status: str  # "ok", or the kind of failure: "http 429", "connection", "malformed stream", "cut short", …
    error: str = ""
    chunk_gaps_s: list[float] = field(default_factory=list)  # between arrivals of chunks
    chunk_tokens: list[int] = field(default_factory=list)  # tokens of each chunk, the first one included


@dataclass(frozen=True, slots=True)
class ServerState:
    """One reading; None where the server has no such metric. Summed over engines, `kv_use` (0..1) is the fullest's."""

    at_s: float  # of a monotonic clock; in a file since the start of the load point
    running: float | None = None
    waiting: float | None = None
    kv_use: float | None = None
    preemptions: float | None = None  # a counter
    retracted_now: float | None = None  # a gauge, where there is no counter
    prefix_queries: float | None = None  # counters, in tokens
    prefix_hits: float | None = None


@dataclass(slots=True)
class PointRow:
    """One load point: one rate, one run, one configuration; latencies in ms over the requests of the window."""

    point_id: str
    configuration: str
    workload: str
    phase: Phase
    rate: float  # asked, requests/s
    sustained: bool | None  # None: not judged (a probe, or an invalid point)
    reason: str  # why it counts as (un)sustained or invalid, in words
    valid: bool
    provisional: bool  # the window was shorter than the answer's precision asks for
    preemptions: int | None  # None: the server has no such counter
    requests: int  # in the window
    completed: int
    failed: int
    window_s: float
    achieved_rate: float  # completions/s in the window
    input_tok_s: float
    output_tok_s: float
    prefix_hit_rate: float | None
    kv_use_max: float | None  # 0..1
    waiting_max: int | None
    running_max: int | None
    lateness_p99_ms: float  # sent - intended
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    e2e_p50_ms: float
    e2e_p99_ms: float
    itl_p99_low_ms: float  # 95 % interval of the P99; its high end is inf where the window is too short to tell it
    itl_p99_high_ms: float
    ttft_p99_low_ms: float
    ttft_p99_high_ms: float
    seed: int
    started: str  # ISO 8601, UTC
    binding: str = ""  # what an unsustained point ran into, as in Answer
    repeat: int = 0  # tells runs of the same rate apart: each has requests of its own
    warmup_s: float = 0.0  # before the window, not counted
    tokens_per_chunk: float = 1.0  # gaps between chunks are gaps between tokens only where this is 1
    backlog_growth: float = 0.0  # requests by which the backlog grew over the window …
    backlog_noise: float = 0.0  # … and how much of that would be noise
    cut_short: int = 0  # requests of the window still open when the point ended: their latencies are lower bounds
    failures: str = ""  # by kind, warm-up included: "connection:3;http 429:12"
    goodput: float | None = None  # requests/s of the window that met every limit; None: there were none to meet
    concurrency: int | None = None  # of a closed loop, whose rate is what came out; None: an open loop
    generator_processes: int = 1
    generator_cpu_share: float = 0.0  # of one core, the busiest process
    generator_starved_share: float = 0.0  # of the time: ready to run while others had its core
    generator_us_per_chunk: float = 0.0  # CPU time
    loop_lag_p99_ms: float = 0.0  # from the arrival of bytes to their read
    verdict: str = ""  # "sustained", "not sustained", "undecided", "invalid"; "": not judged, or an older file
    ttft_trend: float | None = None  # growth of TTFT over the window, seconds per second; None: too few requests
    itl_steps: int = 0  # engine steps behind the gaps; 0 in files of before steps were counted
    coalesced_reads: int = 0  # reads that held several chunks, which then share the stamp of the last
    others_cpu_share: float | None = None  # of the cores, used by others than server and generator; None: not known
    steal_share: float | None = None  # of the cores, taken by the hypervisor
    disturbed: bool = False  # the two together are more than DISTURBED_SHARE

    @property
    def disturbance(self) -> str:
        """By what the point was disturbed, in words; "" where it wasn't."""
        if not self.disturbed:
            return ""
        words = f"other processes used {self.others_cpu_share or 0:.0%} of the cores"
        return words + (f" and the hypervisor took {self.steal_share:.0%}" if (self.steal_share or 0) >= 0.01 else "")

    @property
    def undecided(self) -> bool:
        """Whether its window could not tell whether the rate is sustained."""
        return self.verdict == "undecided"


@dataclass(slots=True)
class Answer:
    """What a search found for one configuration and workload: the highest sustained rate and what binds."""

    configuration: str
    workload: str
    rate: float | None  # requests/s; None: not even the lowest rate was sustained
    low: float
    high: float | None  # None: no unsustained rate was reached
    confirmed: bool
    provisional: bool
    binding: str  # "KV cache", "rows", "compute", "client", "latency limit", "not reached", "undecided"
    note: str = ""
    output_tok_s: float | None = None  # at the rate found
    disturbance: str = ""  # what disturbed the points that it rests on, which makes it provisional
    undecided: float | None = None  # the lowest rate above it whose windows could not decide; None: there is none

    def line(self) -> str:
        """The last line of a bench run, e.g. "sustains 4.2 req/s (3.9-4.4); binding: KV cache"."""
        if self.rate is None and self.undecided is not None:
            above = f", not sustained from {self.high:.3g}" if self.high is not None else ""
            return f"undecided at {self.undecided:.3g} req/s{above}: windows too short to tell; binding: {self.binding}"
        if self.rate is None:
            bound = f"below {self.high:.3g} req/s" if self.high is not None else "no rate"
            kind = f" ({self.kind()})" if self.disturbance else ""
            return f"sustains {bound}{kind}; binding: {self.binding}"
        high = f"{self.high:.3g}" if self.high is not None else "?"
        kind = f", undecided from {self.undecided:.3g}" if self.undecided is not None else ""
        kind += f", {self.kind()}" if self.provisional else ""
        state = "" if self.confirmed else ", not confirmed"
        return f"sustains {self.rate:.3g} req/s ({self.low:.3g}–{high}{kind}{state}); binding: {self.binding}"

    def kind(self) -> str:
        """ "provisional" with its reason where that isn't the length of the windows; "" where the answer isn't."""
        if not self.provisional:
            return ""
        return f"provisional: {self.disturbance}" if self.disturbance else "provisional"


@dataclass(slots=True)
class Summary:
    """What was run, on what, and what came out."""

    title: str
    seed: int
    configurations: dict[str, dict[str, Any]]
    workloads: dict[str, dict[str, Any]]
    answers: list[Answer] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # "configuration / workload" -> cause
    versions: dict[str, str] = field(default_factory=lambda: versions())
    hardware: dict[str, Any] = field(default_factory=lambda: hardware())
    started: str = field(default_factory=lambda: utc_now())
    finished: str | None = None


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what can change a figure; in a checkout with the commit, since its version changes seldom."""
    found = {"python": platform.python_version(), **_commit()}
    for name in ("redline-llm", "torch", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> dict[str, str]:
    """The commit this code is from, with a "+" where files have been changed since; nothing outside a checkout."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    asked = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty=+", "--match="]
    said = subprocess.run(asked, capture_output=True, text=True)
    return {"commit": said.stdout.strip()} if said.returncode == 0 else {}


def hardware() -> dict[str, Any]:
    """The machine in words: processor, and what of its cores and memory (GiB) this process may use."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": cores(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }


class RunFiles:
    """Writes and reads the files of one run; every write leaves complete files behind."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.unwritten = ""  # why load points are here alone
        self._kept: dict[str, tuple[PointRow, list[RequestRow]]] = {}  # of which nothing could be written

    def write_summary(self, summary: Summary) -> None:
        """Raises CannotWriteError."""
        text = json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False) + "\n"
        with writing(self.folder / SUMMARY_FILE, FLAG):
            replace_file(self.folder / SUMMARY_FILE, lambda part: part.write_text(text, encoding="utf-8"))

    def read_summary(self) -> Summary:
        data = json.loads((self.folder / SUMMARY_FILE).read_text(encoding="utf-8-sig"))
        data["answers"] = [Answer(**answer) for answer in data["answers"]]
        return Summary(**data)

    def add_point(self, point: PointRow, requests: list[RequestRow], readings: Sequence[ServerState] = ()) -> None:
        """Write the requests first, then the point, so that a point in points.csv always has its requests.

        The `at_s` of the readings counts from the start of the point; without readings no file of them is written.
        Raises CannotWriteError; the point and its requests are then kept in memory, where they can still be read.
        """
        try:
            with writing(self.folder, FLAG):
                self._write_rows(REQUESTS_FOLDER, point.point_id, RequestRow, requests)
                if readings:
                    self._write_rows(METRICS_FOLDER, point.point_id, ServerState, readings)
                else:
                    (self.folder / METRICS_FOLDER / f"{point.point_id}.parquet").unlink(missing_ok=True)
                rows = [p for p in self.read_points() if p.point_id not in self._kept and p.point_id != point.point_id]
                self.write_points([*rows, point])
        except CannotWriteError as error:
            self.unwritten = str(error)
            self._kept[point.point_id] = point, requests
            raise

    def _write_rows(self, folder: str, point_id: str, kind: type, rows: Sequence[Any]) -> None:
        frame = _frame(kind, rows)
        if kind is ServerState:
            frame = frame.astype(float)  # a metric the server lacks is a column of NaN, not one without a type
        replace_file(self.folder / folder / f"{point_id}.parquet", frame.to_parquet)

    def write_points(self, points: list[PointRow]) -> None:
        names = [f.name for f in dataclasses.fields(PointRow)]

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8") as f:
                writer = csv.writer(f)
                writer.writerow(names)
                for point in points:
                    writer.writerow([_cell(getattr(point, name)) for name in names])

        with writing(self.folder / POINTS_FILE, FLAG):
            replace_file(self.folder / POINTS_FILE, write)

    def read_points(self) -> list[PointRow]:
        """What points.csv holds, and what could not be written to it."""
        path = self.folder / POINTS_FILE
        kept = [point for point, _ in self._kept.values()]
        if not path.exists():
            return kept
        kinds = get_type_hints(PointRow)
        with path.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets put a byte order mark before it
            rows = [PointRow(**{k: _value(v, kinds[k]) for k, v in row.items()}) for row in csv.DictReader(f)]
        return [*(row for row in rows if row.point_id not in self._kept), *kept]

    def requests_path(self, point_id: str) -> Path:
        return self.folder / REQUESTS_FOLDER / f"{point_id}.parquet"

    def read_requests(self, point_id: str) -> pd.DataFrame:
        if point_id in self._kept:
            return _frame(RequestRow, self._kept[point_id][1])
        return pd.read_parquet(self.requests_path(point_id))

    def read_metrics(self, point_id: str) -> pd.DataFrame | None:
        """The server's readings during a point, columns of ServerState; None where there were none."""
        path = self.folder / METRICS_FOLDER / f"{point_id}.parquet"
        return pd.read_parquet(path) if path.exists() else None


def _frame(kind: type, rows: Sequence[Any]) -> pd.DataFrame:
    return pd.DataFrame([dataclasses.asdict(r) for r in rows], columns=[f.name for f in dataclasses.fields(kind)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: Any) -> Any:
    options = getattr(kind, "__args__", (kind,))
    if text == "" and type(None) in options:
        return None
    if bool in options:
        return text == "true"
    if int in options:
        return int(text)
    if float in options:
        return float(text)
    return text
