"""Runs a sweep: every configuration on every workload, each on a server of its own; continues an interrupted one.

For each workload all configurations are searched first. Their ladders follow, at the same absolute rates for all, so
that the curves can be compared. Given rates replace both. Ladders and given rates may be measured in several rounds,
in which the configurations are interleaved.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.generators import Generators
from bench.measurement.offline import OfflinePoint, ServedOffline
from bench.measurement.progress import Progress
from bench.measurement.run import BenchOptions, Subject, measure_configuration, measure_ladder
from bench.results import (
    FLAG,
    GENERATORS_FILE,
    METRICS_FOLDER,
    POINTS_FILE,
    REQUESTS_FOLDER,
    SUMMARY_FILE,
    PointRecord,
    RunFiles,
    Summary,
    slug,
    utc_now,
)
from bench.results.writing import CannotWriteError, check_folder
from bench.sweeps.configurations import Configuration, model_len
from bench.sweeps.starting import Started, started
from bench.sweeps.state import STATE_FILE, SweepState
from bench.sweeps.sweepfile import SweepPlan, SweepWorkload
from bench.workloads.arrivals import Arrivals
from engine.simulation import Simulate

LOGS_FOLDER = "logs"
_SEARCH_SHARE = 0.5  # limit of the search, of the time of one configuration on one workload; the rest is the ladder's
_LADDER_LOW, _LADDER_HIGH = 0.25, 1.5  # x the lowest and the highest of the rates found
_LADDER_POINTS = 6
_EVEN_UP_TO = 2.0  # ratio of the rates found up to which the ladder has even steps


def run_sweep(
    plan: SweepPlan,
    folder: Path,
    progress: Progress,
    simulate: Simulate | None = None,
    generators: Generators | None = None,
    *,
    fresh: bool = False,
) -> Summary:
    """Measure what is not measured yet; failed runs and their causes are in the summary's `failures`.

    `simulate` makes the engines of configurations on simulated hardware; it is needed if there are any. `generators`
    send the load of the others; without them this process and its children do.

    Raises BenchError if `folder` has results of another sweep and `fresh` is not set, CannotWriteError if it cannot be
    written to, InterruptedRunError on Ctrl-C.
    """
    check_folder(folder, FLAG)
    if fresh:
        discard(folder)
    sweep = _Sweep(plan, folder, progress, simulate, generators)
    sweep.run()
    return sweep.summary


def discard(folder: Path) -> None:
    """Remove the results of an earlier run; other files in the folder are kept."""
    if not any((folder / name).exists() for name in (STATE_FILE, SUMMARY_FILE, POINTS_FILE)):
        return  # a folder "logs" in it may not be ours
    for name in (STATE_FILE, POINTS_FILE, GENERATORS_FILE, SUMMARY_FILE):
        (folder / name).unlink(missing_ok=True)
    for name in (REQUESTS_FOLDER, METRICS_FOLDER, LOGS_FOLDER):
        shutil.rmtree(folder / name, ignore_errors=True)


def common_ladder(found: Sequence[float], shares: Sequence[float] = ()) -> list[float]:
    """Rates that are common to all configurations: from 0.25 x the lowest rate found to 1.5 x the highest.

    With `shares`, these multiples of the lowest rate found instead: fewer load points, with more requests each.
    """
    low, high = min(found), max(found)
    if shares:
        rates = [share * low for share in shares]
    elif high / low <= _EVEN_UP_TO:
        step = (_LADDER_HIGH * high - _LADDER_LOW * low) / (_LADDER_POINTS - 1)
        rates = [_LADDER_LOW * low + i * step for i in range(_LADDER_POINTS)]
    else:
        points = _LADDER_POINTS + 1
        ratio = (_LADDER_HIGH * high / (_LADDER_LOW * low)) ** (1 / (points - 1))
        rates = [_LADDER_LOW * low * ratio**i for i in range(points)]
    return [float(f"{rate:.3g}") for rate in rates]


class _Sweep:
    def __init__(
        self,
        plan: SweepPlan,
        folder: Path,
        progress: Progress,
        simulate: Simulate | None,
        generators: Generators | None,
    ):
        self._plan = plan
        self._simulate = simulate
        self._generators = generators
        self._folder = folder
        self._files = RunFiles(folder)
        self._progress = progress
        self._state = self._open_state()
        self.summary = self._open_summary()

    def run(self) -> None:
        self.summary.failures.clear()  # failed runs are tried again
        self._save()
        for workload in self._plan.workloads:
            for configuration in self._plan.of_workload(workload):
                self._show_answer(configuration, workload)
        for workload in self._plan.workloads:
            configurations = self._plan.of_workload(workload)
            if workload.options.offline:
                for configuration in configurations:
                    if not any(p.valid for p in self._points(configuration, workload)):
                        self._step(configuration, workload, "offline")
                continue
            fixed = workload.options.rates
            searched = [] if fixed else configurations[: 1 if workload.options.search == "first" else None]
            for configuration in searched:
                if not self._answered(configuration, workload):
                    self._step(configuration, workload, "search")
            ladder = self._ladder_rates(workload)
            for number in range(workload.options.rounds) if fixed or ladder else ():
                for configuration in configurations:
                    if self._is_due(configuration, workload, number, configuration in searched):
                        self._step(configuration, workload, "rates" if fixed else "ladder", ladder)
        self.summary.finished = utc_now()
        self._save()

    def _is_due(self, configuration: Configuration, workload: SweepWorkload, number: int, searched: bool) -> bool:
        """Whether round `number` of the ladder or the given rates is the next one of the configuration."""
        answered, done = self._answered(configuration, workload), self._rounds_done(configuration, workload)
        if searched and not answered:
            return False
        if workload.options.rates and (answered != bool(done)):
            # The sweep ended between writing two files, or an older version without rounds wrote them.
            done = workload.options.rounds if answered else 0
        return done == number

    def _step(
        self, configuration: Configuration, workload: SweepWorkload, stage: str, ladder: list[float] | None = None
    ) -> None:
        """Start the server and measure one stage; an error is recorded and ends this stage only."""
        what = _key(configuration, workload)
        self._progress.message(f"\n{what}: {stage}")
        self._progress.run_state(configuration.name, workload.name, f"{stage}: starting the server")
        self._files.keeps_requests = workload.options.requests
        try:
            with self._server(configuration, workload, stage) as server:
                if workload.options.offline:
                    self._measure_offline(configuration, workload, server)
                elif ladder is None:
                    self._measure(configuration, workload, server)
                else:
                    self._measure_ladder(configuration, workload, server, ladder)
        except CannotWriteError:
            raise  # later stages could not be written either
        except BenchError as error:
            self._fail(configuration, workload, str(error))
        finally:
            self._save()

    def _measure(self, configuration: Configuration, workload: SweepWorkload, server: Started) -> None:
        known, wanted = self._points(configuration, workload), workload.options
        number, minutes = self._rounds_done(configuration, workload), self._minutes(configuration, workload)
        if wanted.rates:
            known = [p for p in known if p.phase != "probe" or not number]  # each new server is warmed up by a probe
            options = self._options(workload, minutes / wanted.rounds, rates=wanted.rates, round=number)
        else:
            share = _SEARCH_SHARE if self._has_ladder(workload) else 1.0
            options = self._options(workload, share * minutes)
        subject = self._subject(configuration, server, options)
        began = server.under_test.now()
        try:
            answer = measure_configuration(subject, known)
        finally:
            what = _key(configuration, workload)
            used_s = self._state.searched_s.get(what, 0.0) + server.under_test.now() - began
            self._state.searched_s[what] = used_s
        if answer is None:
            raise BenchError(self._why_unanswered(configuration, workload))
        mine = (configuration.name, workload.name)
        self.summary.answers = [a for a in self.summary.answers if (a.configuration, a.workload) != mine] + [answer]
        if wanted.rates:
            self._state.ladders.append([configuration.name, workload.name])
        self._progress.message(f"{configuration.name}: {answer.line()}")
        self._show_answer(configuration, workload)

    def _why_unanswered(self, configuration: Configuration, workload: SweepWorkload) -> str:
        points = self._points(configuration, workload)
        invalid = [p.reason for p in points if not p.valid and p.phase != "probe"]
        if invalid:
            return f"no load point produced a valid result: {invalid[-1]}"
        alone = next((f" (one request alone takes {p.e2e_p50_ms / 1e3:.3g} s)" for p in points), "")
        return f"max_minutes is too short for one load point{alone}: raise it, or use shorter requests"

    def _measure_ladder(
        self, configuration: Configuration, workload: SweepWorkload, server: Started, rates: list[float]
    ) -> None:
        # Without the probe, which is repeated to warm up the new server.
        known = [p for p in self._points(configuration, workload) if p.phase != "probe"]
        limit, rounds = self._minutes(configuration, workload), workload.options.rounds
        searched = self._state.searched_s.get(_key(configuration, workload), 0.0) / 60
        if workload.options.search == "first":
            searched = limit  # all configurations get windows of the same length, searched or not
        minutes = max(limit - searched, (1 - _SEARCH_SHARE) * limit) / rounds
        number = self._rounds_done(configuration, workload)
        options = self._options(workload, minutes, ladder_rates=rates, round=number)
        subject = self._subject(configuration, server, options)
        if not measure_ladder(subject, known):
            raise BenchError("max_minutes is too short for one load point of the ladder: raise it")
        self._state.ladders.append([configuration.name, workload.name])
        self._show_answer(configuration, workload)

    def _measure_offline(self, configuration: Configuration, workload: SweepWorkload, server: Started) -> None:
        count = workload.options.offline
        assert count is not None
        if not configuration.is_simulated:
            raise BenchError(
                "offline needs simulated hardware (--device sim:NAME); others have redline bench --offline"
            )
        engine = ServedOffline(server.under_test)
        point = OfflinePoint(engine, server.requests, configuration.name, count, self._plan.seed)
        record, requests = point.run(lambda: None)
        self._files.add_point(record, requests)
        if not record.valid:
            raise BenchError(record.reason)
        self._progress.message(f"{configuration.name}: {record.achieved_rate:.3g} req/s offline")
        self._progress.run_state(configuration.name, workload.name, f"{record.achieved_rate:.3g} req/s offline")

    def _subject(self, configuration: Configuration, server: Started, options: BenchOptions) -> Subject:
        return Subject(
            server.under_test, server.requests, configuration.name, options, self._files, self._progress, server.meter
        )

    def _minutes(self, configuration: Configuration, workload: SweepWorkload) -> float:
        """The time limit of a configuration on a workload, in minutes of its clock."""
        options = workload.options
        return options.max_virtual_minutes if configuration.is_simulated else options.max_minutes

    def _options(self, workload: SweepWorkload, max_minutes: float, **rates: Any) -> BenchOptions:
        wanted = workload.options
        return BenchOptions(
            seed=self._plan.seed,
            precision=wanted.precision,
            max_minutes=max_minutes,
            window_s=wanted.window_s,
            warmup_s=wanted.warmup_s,
            limits=dict(wanted.limits),
            arrivals=wanted.arrivals,
            ladder=False,
            **rates,
        )

    @contextlib.contextmanager
    def _server(self, configuration: Configuration, workload: SweepWorkload, stage: str) -> Iterator[Started]:
        """Start the configuration's server, and note in the summary what it reports; stops the server at the end."""
        log = self._folder / LOGS_FOLDER / f"{slug(_key(configuration, workload))}-{stage}.log"
        show, simulate, generators = self._progress.message, self._simulate, self._generators
        with started(configuration, workload, log, show, simulate, generators) as server:
            known = self.summary.configurations[configuration.name]
            model = {} if workload.model else {"model": known["model"] or server.model}
            known |= model | server.known
            known.setdefault("resolved", {})[workload.name] = server.resolved
            yield server

    def _fail(self, configuration: Configuration, workload: SweepWorkload, cause: str) -> None:
        what = _key(configuration, workload)
        cause = " ".join(cause.split())
        self.summary.failures[what] = cause
        self._progress.message(f"{what}: failed: {cause}")
        self._progress.run_state(configuration.name, workload.name, f"failed: {cause}")

    def _show_answer(self, configuration: Configuration, workload: SweepWorkload) -> None:
        """Report the answer of a run, and whether its ladder is still to be measured."""
        mine = (configuration.name, workload.name)
        for answer in self.summary.answers:
            if (answer.configuration, answer.workload) == mine:
                unfinished = self._rounds_done(configuration, workload) < workload.options.rounds
                pending = self._has_ladder(workload) and answer.rate and unfinished
                self._progress.run_state(*mine, answer.text() + (", ladder pending" if pending else ""))

    def _points(self, configuration: Configuration, workload: SweepWorkload) -> list[PointRecord]:
        mine = (configuration.name, workload.name)
        return [p for p in self._files.read_points() if (p.configuration, p.workload) == mine]

    def _answered(self, configuration: Configuration, workload: SweepWorkload) -> bool:
        mine = (configuration.name, workload.name)
        return any((a.configuration, a.workload) == mine for a in self.summary.answers)

    def _has_ladder(self, workload: SweepWorkload) -> bool:
        return bool(workload.options.ladder) and workload.options.rates is None

    def _rounds_done(self, configuration: Configuration, workload: SweepWorkload) -> int:
        """The number of finished rounds of the ladder or the given rates."""
        return self._state.ladders.count([configuration.name, workload.name])

    def _ladder_rates(self, workload: SweepWorkload) -> list[float] | None:
        """The workload's ladder, which the first answers determine for good; None if no rate was sustained."""
        if not self._has_ladder(workload):
            return None
        found = [a.rate for a in self.summary.answers if a.workload == workload.name and a.rate]
        if workload.name not in self._state.ladder_rates and found:
            ladder = workload.options.ladder
            shares = ladder if isinstance(ladder, tuple) else ()
            self._state.ladder_rates[workload.name] = common_ladder(found, shares)
            self._save()  # a configuration that is tried again later must not change them
            self.summary.workloads[workload.name]["ladder_rates"] = self._state.ladder_rates[workload.name]
        return self._state.ladder_rates.get(workload.name)

    def _open_state(self) -> SweepState:
        state, plan = SweepState.read(self._folder), _digest(self._plan)
        if state is None:
            for name in (SUMMARY_FILE, POINTS_FILE):
                if (self._folder / name).exists():
                    raise BenchError(
                        f"{self._folder} contains other results: choose another folder with --out, or discard them "
                        "with --fresh"
                    )
            return SweepState(plan)
        if state.plan != plan:
            raise BenchError(
                f"{self._folder} contains results of another version of this sweep: choose another folder with --out, "
                "or discard them with --fresh"
            )
        return state

    def _open_summary(self) -> Summary:
        if (self._folder / SUMMARY_FILE).exists():
            summary = self._files.read_summary()
            summary.title, summary.finished = self._plan.title, None
            return summary
        return Summary(
            title=self._plan.title,
            seed=self._plan.seed,
            configurations={c.name: c.describe() for c in self._plan.configurations},
            workloads={w.name: _describe(w) for w in self._plan.workloads},
        )

    def _save(self) -> None:
        # The state first: a folder with a summary but without a state is rejected as containing other results.
        self._state.write(self._folder)
        self._files.write_summary(self.summary)


def _describe(workload: SweepWorkload) -> dict[str, Any]:
    options = workload.options
    fields = {
        "precision": options.precision,
        "max_minutes": options.max_minutes,
        "max_virtual_minutes": options.max_virtual_minutes,
        "window_s": options.window_s,
        "warmup_s": options.warmup_s,
        "rates": list(options.rates) if options.rates else None,
        "limits": dict(options.limits) or None,
        "arrivals": asdict(options.arrivals) if options.arrivals != Arrivals() else None,
    }
    known = {key: value for key, value in fields.items() if value is not None}
    own = {"model": workload.model, "serve": workload.serve or None, "offline": options.offline}
    described = {key: value for key, value in own.items() if value is not None}
    return {**workload.spec, **described, "max_model_len": model_len(workload.max_tokens), "options": known}


def _digest(plan: SweepPlan) -> str:
    """A hash of everything in the sweep file that influences a measurement."""
    data = {key: value for key, value in plan.data.items() if key not in ("title", "description")}
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def _key(configuration: Configuration, workload: SweepWorkload) -> str:
    return f"{configuration.name} / {workload.name}"
