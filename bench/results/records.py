"""Result files: one record per request, one per load point, one summary per run.

results/NAME/
    summary.json                 versions, hardware, seed, configurations, one answer per (configuration, workload)
    points.csv                   one PointRow per load point
    requests/POINT_ID.parquet    one RequestRow per request
    metrics/POINT_ID.parquet     one ServerState per reading of the server's metrics, if it has any
"""

import csv
import dataclasses
import json
import math
import os
import platform
import re
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

from bench.results.writing import CannotWriteError, replace_file, writing
from engine.host import cores, total_memory

Phase = Literal["probe", "search", "confirm", "ladder", "fixed", "closed"]

POINTS_FILE = "points.csv"
SUMMARY_FILE = "summary.json"
REQUESTS_FOLDER = "requests"
METRICS_FOLDER = "metrics"
FLAG = "--out"
DISTURBED_SHARE = 0.1  # of the cores: if others use more, a load point is disturbed

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_STUDENT_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of at least three values (Student's t)."""
    n = len(values)
    return _STUDENT_T.get(n - 1, _STUDENT_T[9]) * statistics.stdev(values) / math.sqrt(n)


@dataclass(slots=True)
class RequestRow:
    """One request of a load point; `intended_s` and `sent_s` in seconds since its start."""

    index: int
    intended_s: float
    sent_s: float
    ttft_s: float | None  # from the intended send time, as e2e_s
    e2e_s: float | None
    input_tokens: int
    asked_output_tokens: int
    output_tokens: int
    cached_tokens: int
    in_window: bool
    status: str  # "ok", or the kind of failure: "http 429", "connection", "malformed stream", "cut short", …
    error: str = ""
    chunk_gaps_s: list[float] = field(default_factory=list)  # between arrivals of chunks
    chunk_tokens: list[int] = field(default_factory=list)  # tokens of each chunk, including the first


@dataclass(frozen=True, slots=True)
class ServerState:
    """One reading of the server's metrics, summed over engines (`kv_use`: maximum); None without such a metric."""

    at_s: float  # on a monotonic clock; in files since the start of the load point
    running: float | None = None
    waiting: float | None = None
    kv_use: float | None = None  # 0..1
    preemptions: float | None = None  # a counter
    retracted_now: float | None = None  # a gauge, if there is no counter
    prefix_queries: float | None = None  # counters, in tokens
    prefix_hits: float | None = None


@dataclass(slots=True)
class PointRow:
    """One load point: one run of one rate; latencies in ms over the requests of the window."""

    point_id: str
    configuration: str
    workload: str
    phase: Phase
    rate: float  # requested, requests/s
    sustained: bool | None  # None: undecided, invalid or not judged
    reason: str  # of the verdict
    valid: bool
    provisional: bool  # the window was shorter than the precision requires
    preemptions: int | None  # None: the server has no such counter
    requests: int  # due within the window
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
    itl_p99_low_ms: float  # 95 % interval of the P99; the high end is inf if the window is too short
    itl_p99_high_ms: float
    ttft_p99_low_ms: float
    ttft_p99_high_ms: float
    seed: int
    started: str  # ISO 8601, UTC
    binding: str = ""  # what limited a load point that is not sustained, as in Answer
    repeat: int = 0  # number of the run of this rate; each run has other requests
    warmup_s: float = 0.0  # before the window
    tokens_per_chunk: float = 1.0  # gaps between chunks are gaps between tokens only if this is 1
    backlog_growth: float = 0.0  # over the window, in requests
    backlog_noise: float = 0.0  # growth up to which nothing is concluded
    cut_short: int = 0  # requests of the window open when the load point ended: their latencies are lower bounds
    failures: str = ""  # failed requests by kind, including the warm-up: "connection:3;http 429:12"
    goodput: float | None = None  # requests/s of the window that met every limit; None: no limits
    concurrency: int | None = None  # of a closed loop, whose `rate` is the completed one; None: an open loop
    generator_processes: int = 1
    generator_cpu_share: float = 0.0  # of one core, the busiest process
    generator_starved_share: float = 0.0  # of the time: ready to run while other processes had its core
    generator_us_per_chunk: float = 0.0  # CPU time
    loop_lag_p99_ms: float = 0.0  # from the arrival of bytes to their read
    verdict: str = ""  # "sustained", "not sustained", "undecided", "invalid"; "": not judged, or an older file
    ttft_trend: float | None = None  # growth of TTFT over the window, seconds per second; None: too few requests
    itl_steps: int = 0  # engine steps behind the gaps; 0 in older files
    coalesced_reads: int = 0  # reads that contained several chunks, which share the timestamp of the last
    others_cpu_share: float | None = None  # of the cores, used by other processes; None: not known
    steal_share: float | None = None  # of the cores, taken by the hypervisor; None: not known
    disturbed: bool = False  # the two together exceed DISTURBED_SHARE

    @property
    def disturbance(self) -> str:
        """What disturbed the load point, as text; "" if it was not disturbed."""
        if not self.disturbed:
            return ""
        text = f"other processes used {self.others_cpu_share or 0:.0%} of the cores"
        return text + (f" and the hypervisor took {self.steal_share:.0%}" if (self.steal_share or 0) >= 0.01 else "")

    @property
    def undecided(self) -> bool:
        return self.verdict == "undecided"

    def failed_requests(self) -> int:
        """The number of failed requests, including the warm-up."""
        return sum(count for _, count in self._failures())

    def failure_text(self) -> str:
        """The failures by kind, the most frequent first: "12 × http 429, 3 × connection"."""
        return ", ".join(f"{count} × {kind}" for kind, count in sorted(self._failures(), key=lambda pair: -pair[1]))

    def _failures(self) -> list[tuple[str, int]]:
        parts = [part.rpartition(":") for part in self.failures.split(";") if part]
        return [(kind, int(count)) for kind, _, count in parts]


@dataclass(slots=True)
class Answer:
    """The result of a search for one configuration and workload: the highest sustained rate and what limits it."""

    configuration: str
    workload: str
    rate: float | None  # requests/s; None: not even the lowest rate was sustained
    low: float
    high: float | None  # lowest rate above it that failed; None: none failed
    confirmed: bool
    provisional: bool
    binding: str  # "KV cache", "batch slots", "compute", "client", "latency limit", "not reached", "undecided"
    note: str = ""
    output_tok_s: float | None = None  # at `rate`
    disturbance: str = ""  # what disturbed the load points that it rests on, which makes it provisional
    undecided: float | None = None  # lowest undecided rate above it; None: there is none

    def line(self) -> str:
        """The last line of a bench run, e.g. "sustains 4.2 req/s (3.9–4.4); binding: KV cache"."""
        hint = ": windows too short" if self.rate is None and self.undecided is not None else ""
        return f"{self.text()}{hint}; binding: {self.binding}"

    def text(self) -> str:
        """The answer without its binding, e.g. "sustains 4.2 req/s (3.9–4.4)"."""
        if self.rate is None and self.undecided is not None:
            above = f", not sustained from {self.high:.3g}" if self.high is not None else ""
            return f"undecided at {self.undecided:.3g} req/s{above}"
        if self.rate is None:
            failed = f" (all from {self.high:.3g} req/s failed)" if self.high is not None else ""
            mark = f" ({self.provisional_text()})" if self.disturbance else ""
            return f"sustains no rate tried{failed}{mark}"
        high = f"{self.high:.3g}" if self.high is not None else "?"
        marks = f", undecided from {self.undecided:.3g}" if self.undecided is not None else ""
        marks += f", {self.provisional_text()}" if self.provisional else ""
        marks += "" if self.confirmed else ", not confirmed"
        return f"sustains {self.rate:.3g} req/s ({self.low:.3g}–{high}{marks})"

    def provisional_text(self) -> str:
        """ "provisional", with the disturbance if there was one; "" if the answer is not provisional."""
        if not self.provisional:
            return ""
        return f"provisional: {self.disturbance}" if self.disturbance else "provisional"


@dataclass(slots=True)
class Summary:
    """What a run measured, on which machine, and its answers."""

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


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-") or "x"


def versions() -> dict[str, str]:
    """Versions of what influences a measurement; in a checkout also the commit."""
    found = {"python": platform.python_version(), **_commit()}
    for name in ("redline-llm", "torch", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> dict[str, str]:
    """The commit of this code, with a "+" if files were changed; nothing outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty=+", "--match="]
    result = subprocess.run(command, capture_output=True, text=True)
    return {"commit": result.stdout.strip()} if result.returncode == 0 else {}


def hardware() -> dict[str, Any]:
    """The machine: processor, and the cores and memory (GiB) that this process may use."""
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
    """Writes and reads the files of one run; files are always complete."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.unwritten = ""  # why a load point could not be written
        self._kept: dict[str, tuple[PointRow, list[RequestRow]]] = {}  # load points that could not be written

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
        """Write the requests first, then the load point, so that a point in points.csv always has its requests.

        `at_s` of the readings is relative to the start of the load point. Raises CannotWriteError; the load point and
        its requests are then kept in memory, where they can still be read.
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
            frame = frame.astype(float)  # a missing metric is a column of NaN, not one without a type
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
        """The load points of points.csv, and those that could not be written to it."""
        path = self.folder / POINTS_FILE
        kept = [point for point, _ in self._kept.values()]
        if not path.exists():
            return kept
        kinds = get_type_hints(PointRow)
        with path.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets add a byte order mark
            rows = [PointRow(**{k: _value(v, kinds[k]) for k, v in row.items()}) for row in csv.DictReader(f)]
        return [*(row for row in rows if row.point_id not in self._kept), *kept]

    def requests_path(self, point_id: str) -> Path:
        return self.folder / REQUESTS_FOLDER / f"{point_id}.parquet"

    def read_requests(self, point_id: str) -> pd.DataFrame:
        if point_id in self._kept:
            return _frame(RequestRow, self._kept[point_id][1])
        return pd.read_parquet(self.requests_path(point_id))

    def read_metrics(self, point_id: str) -> pd.DataFrame | None:
        """The readings of the server's metrics during a load point, columns of ServerState; None if there are none."""
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
