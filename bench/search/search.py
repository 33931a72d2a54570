"""The search for the highest sustained rate: doubling, bisection, confirmation. It has no sockets and no clock.

`measure` runs one load point and returns its record, or None if no further one can be run (the time is up, or the user
stopped the run). The search then returns what it has found so far.
"""

import contextlib
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.results import Answer, Phase, PointRow, half_interval
from bench.search.criteria import binding_of_search

_MOST_DOUBLINGS = 20
_MOST_HALVINGS = 6
_MOST_CONFIRMATIONS = 10
_MOST_CHALLENGES = 4
_MOST_POINTS = 60
_MOST_DISTURBED = 2
_MOST_PASSED = 2  # consecutive undecided rates that the doubling passes over
_MOST_EXTENSIONS = 2  # of an undecided window, each twice as long
_CLEAR_OVERLOAD = 5.0  # growth of the backlog, as a multiple of its noise, that only an overload explains
CONFIRMATION_RUNS = 3  # of the answer, if time allows: their spread gives its interval


@dataclass(frozen=True, slots=True)
class Trial:
    """A load point that the search requests."""

    rate: float
    phase: Phase
    repeat: int = 0  # number of the run of this rate; each run has other requests
    points_left: int = 1  # this one and the expected number of later ones
    whole: bool = False  # only useful with a window of full length
    window_s: float = 0.0  # only useful with a window of this length, since half of it was undecided; 0: any length


Measure = Callable[[Trial], PointRow | None]


class _StoppedError(Exception):
    """No further load point; not `final` if only the time for searching is over and a confirmation may still fit."""

    def __init__(self, final: bool):
        self.final = final


@dataclass(slots=True)
class _Bracket:
    """The load points so far, and the rates between which the answer lies."""

    measure: Measure
    precision: float
    rows: list[PointRow] = field(default_factory=list)
    disturbed_again: list[bool] = field(default_factory=list)  # for each repetition of a disturbed load point
    narrow: bool = True  # False: there is no time left to narrow the bracket
    extended: list[PointRow] = field(default_factory=list)  # measured in longer windows than planned
    open_rows: list[PointRow] = field(default_factory=list)  # undecided in the longest window that time allowed

    def try_rate(self, rate: float, phase: Phase, points_left: int, *, whole: bool = False) -> bool:
        """Measure one rate, in longer windows while it is undecided; returns whether it is sustained.

        A rate that is still undecided counts as not sustained. A load point that is invalid because of the client is
        run once more, then it counts as not sustained too.
        """
        rate = round_rate(rate)
        row = self.try_once(rate, phase, points_left, whole=whole)
        for _ in range(_MOST_EXTENSIONS if row.undecided else 0):
            longer = self._run(rate, phase, points_left, whole, 2 * row.window_s)
            if longer is None:
                break
            row = longer
            if not row.undecided:
                break
        if row.undecided:
            self.open_rows.append(row)
        return bool(row.sustained)

    def try_once(self, rate: float, phase: Phase, points_left: int, *, whole: bool = False) -> PointRow:
        """Measure one rate in one window, which may leave it undecided.

        It is measured again if it was invalid because of the client or disturbed, as time allows.
        """
        rate = round_rate(rate)
        row = self._run(rate, phase, points_left, whole)
        if row is None:
            raise _StoppedError(final=phase == "confirm")
        if row.sustained is None and not row.undecided and sum(1 for r in self.rows if r.rate == rate) == 1:
            again = self._run(rate, phase, points_left, whole)
            if again is None:
                raise _StoppedError(final=phase == "confirm")
            return again
        return self._run_undisturbed(row, phase) if row.disturbed and self._repeats_help() else row

    def _repeats_help(self) -> bool:
        """Whether repeating a disturbed load point is useful: not if the last repetitions were disturbed as well."""
        return len(self.disturbed_again) < _MOST_DISTURBED or not all(self.disturbed_again[-_MOST_DISTURBED:])

    def _run_undisturbed(self, row: PointRow, phase: Phase) -> PointRow:
        try:
            again = self._run(row.rate, phase, 1, whole=True)
        except _StoppedError:
            return row
        if again is None:
            return row  # no time for a repetition: the verdict counts, and the answer is provisional
        self.disturbed_again.append(again.disturbed)
        if again.disturbed and again.sustained != row.sustained and row.sustained:
            return row if self._votes().get(row.rate, 0) > 0 else again
        return again

    def _run(self, rate: float, phase: Phase, points_left: int, whole: bool, window_s: float = 0.0) -> PointRow | None:
        repeat = sum(1 for r in self.rows if r.rate == rate)
        row = self.measure(Trial(rate, phase, repeat, points_left, whole, window_s))
        if row is None:
            return None
        self.rows.append(row)
        if window_s:
            self.extended.append(row)
        if row.sustained is None and not row.undecided and row.binding != "client":
            raise _StoppedError(final=True)  # out of time, or invalid for a reason that other rates share
        return row

    @property
    def counted(self) -> list[PointRow]:
        """The load points that count: a disturbed one does not if its rate has an undisturbed one with a verdict."""
        undisturbed = {r.rate for r in self.rows if r.sustained is not None and not r.disturbed}
        return [r for r in self.rows if not (r.disturbed and r.rate in undisturbed)]

    @property
    def high(self) -> float | None:
        """The lowest rate that was not shown to be sustained."""
        return min((rate for rate, votes in self._votes().items() if votes <= 0), default=None)

    @property
    def failed(self) -> float | None:
        """The lowest rate above the lower end that was measured as not sustained."""
        low = self.low or 0.0
        bad = (rate for rate, votes in self._votes().items() if votes <= 0 and rate > low)
        return min((rate for rate in bad if any(self._failed(r) for r in self.rows if r.rate == rate)), default=None)

    @property
    def undecided(self) -> float | None:
        """The lowest undecided rate between `low` and `failed`."""
        low, failed = self.low or 0.0, self.failed
        between = (r.rate for r in self.rows if r.undecided and r.rate > low and (failed is None or r.rate < failed))
        return min(between, default=None)

    @staticmethod
    def _failed(row: PointRow) -> bool:
        return row.sustained is False or (row.sustained is None and row.binding == "client")

    @property
    def low(self) -> float | None:
        """The highest sustained rate below `high`."""
        high = self.high
        good = (rate for rate, votes in self._votes().items() if votes > 0 and (high is None or rate < high))
        return max(good, default=None)

    def contested(self, rate: float) -> bool:
        """Whether the runs of a rate contradict each other without a majority."""
        return self._votes().get(round_rate(rate)) == 0

    def _votes(self) -> dict[float, int]:
        """For each rate, the number of runs that sustained it minus those that did not.

        Runs with short windows count only if the rate has no run with a whole window. A run that was undecided in the
        longest window counts as not sustained; other undecided runs do not count.

        Example: a rate with whole runs "sustained", "not sustained" and a short run "not sustained" has 0 votes.
        """
        most = self._most(self.rows)
        whole: dict[float, int] = {}
        short: dict[float, int] = {}
        judged = {row.rate for row in self.rows if row.sustained is not None}
        for row in self.counted:
            if row.undecided and not any(row is other for other in self.open_rows):
                continue
            if row.sustained is None and not row.undecided and (row.binding != "client" or row.rate in judged):
                continue
            votes = short if 2 * row.requests < most and not _is_clear(row) else whole
            votes[row.rate] = votes.get(row.rate, 0) + (1 if row.sustained else -1)
        return short | whole

    def _most(self, rows: list[PointRow]) -> int:
        """The number of requests of the longest window that was not extended."""
        return max((r.requests for r in rows if not any(r is other for other in self.extended)), default=0)

    def wide(self) -> bool:
        low, high = self.low, self.high
        if low is None or high is None or not self.narrow:
            return False
        return high / low > (1 + self.precision) * 1.001  # rates are rounded to four digits

    def weak(self) -> bool:
        """Whether the upper end rests on one short window of the doubling with a backlog that hardly grew."""
        runs = [r for r in self.counted if r.rate == self.high]
        if len(runs) != 1 or not self.narrow or _is_clear(runs[0]):
            return False
        return 2 * runs[0].requests < self._most(self.rows)

    def beyond_doubt(self, rate: float) -> bool:
        """Whether a rate failed more than once, or so clearly that a slow moment of the machine is not the cause."""
        runs = [r for r in self.counted if r.rate == rate and r.sustained is False]
        return len(runs) != 1 or _is_clear(runs[0], _CLEAR_OVERLOAD)  # no runs: the client was the limit

    def low_holds(self) -> bool:
        """Whether the lower end is confirmed: by a confirmation run, or by a second run with other requests."""
        runs = [r for r in self.counted if r.sustained and r.rate == self.low]
        return len(runs) > 1 or any(r.phase == "confirm" for r in runs)

    def confirmations(self) -> list[PointRow]:
        """Confirmation runs of the lower end that were long enough to count, with any verdict."""
        runs = [r for r in self.counted if r.phase == "confirm" and r.rate == self.low and r.sustained is not None]
        return [r for r in runs if 2 * r.requests >= self._most(runs)]

    def disturbance(self) -> str:
        """What disturbed the load points at the two ends, as text; "" if nothing did."""
        ends = [r for r in self.counted if r.disturbed and r.rate in (self.low, self.high)]
        worst = max(ends, key=lambda r: (r.others_cpu_share or 0.0) + (r.steal_share or 0.0), default=None)
        return worst.disturbance if worst is not None else ""

    def bisections(self) -> int:
        return bisections(self.high / self.low if self.low and self.high else 2.0, self.precision)


def _is_clear(row: PointRow, times_noise: float = 2.0) -> bool:
    """Whether a load point is so clearly not sustained that a longer window would not change its verdict."""
    hard = row.preemptions or row.failed or row.binding in ("client", "latency limit")
    return not row.sustained and bool(hard or row.backlog_growth >= times_noise * row.backlog_noise)


def round_rate(rate: float) -> float:
    """The rate with four significant digits, as in result files and seeds."""
    return float(f"{rate:.4g}")


def bisections(ratio: float, precision: float) -> int:
    """The number of bisections that narrow a bracket with high/low = `ratio` to `precision`."""
    return max(0, math.ceil(math.log2(max(1.0, math.log(ratio) / math.log1p(precision))) - 1e-9))


def find_sustained(
    measure: Measure, *, start_rate: float, precision: float, configuration: str = "", workload: str = ""
) -> tuple[Answer, list[PointRow]]:
    """Search from `start_rate` (requests/s) until the bracket is within `precision` and its lower end is confirmed.

    Returns the answer and the load points that it rests on, in the order of measurement.
    """
    bracket = _Bracket(measure, precision)
    try:
        _double(bracket, start_rate)
        _confirm(bracket)
        _challenge(bracket)
        _repeat(bracket)
    except _StoppedError as stopped:
        if not stopped.final:
            bracket.narrow = False
            with contextlib.suppress(_StoppedError):
                _decide_lowest(bracket)
                _confirm(bracket)
    return _answer(bracket, configuration, workload), bracket.rows


def _double(b: _Bracket, start_rate: float) -> None:
    rate = start_rate
    # Undecided rates are passed over while doubling; bisection measures them again if they matter.
    passed = 0
    for doubling in range(_MOST_DOUBLINGS + 1):
        points_left = 3 + (not doubling) + b.bisections()
        if passed < _MOST_PASSED:
            row = b.try_once(rate, "search", points_left)
            passed = passed + 1 if row.undecided else 0
            overloaded = not row.sustained and not row.undecided
        else:
            passed, overloaded = 0, not b.try_rate(rate, "search", points_left)
        if overloaded:
            break
        rate *= 2
    else:
        b.narrow = False  # no upper end was found
    if b.low is None:
        _halve(b, rate)


def _decide_lowest(b: _Bracket) -> None:
    """If the time for searching ended before any rate was decided, use the rest for the lowest rate tried."""
    lowest = min((row.rate for row in b.rows), default=None)
    if b.low is None and lowest is not None and all(row.undecided for row in b.rows if row.rate == lowest):
        b.open_rows = [row for row in b.open_rows if row.rate != lowest]  # replaced by a longer window
        b.try_rate(lowest, "confirm", 1)


def _halve(b: _Bracket, rate: float) -> None:
    for _ in range(_MOST_HALVINGS):
        rate /= 2
        if b.try_rate(rate, "search", 3 + b.bisections()):
            return


def _bisect(b: _Bracket) -> None:
    while b.narrow and b.low is not None and len(b.rows) < _MOST_POINTS:
        if b.high is None:
            b.try_rate(b.low * (1 + b.precision) ** 2, "search", 2)  # the upper end turned out to be sustained
        elif b.wide():
            b.try_rate(math.sqrt(b.low * b.high), "search", b.bisections() + 1)
        elif b.weak():
            b.try_rate(b.high, "search", 2)
        else:
            return


def _confirm(b: _Bracket) -> None:
    """Run the answer a second time with other requests; if that fails, step down, each time twice as far."""
    failures = 0
    for _ in range(_MOST_CONFIRMATIONS):
        if not failures or b.low_holds():
            failures = 0
            _bisect(b)
        if b.low_holds():
            return
        if failures:
            assert b.high is not None
            rate = max(b.high / (1 + b.precision) ** 2 ** (failures - 1), b.low or 0.0)
        elif b.low is not None:
            rate = b.low
        else:
            return  # not even the lowest rate was sustained
        good = b.try_rate(rate, "confirm", 1)
        if b.contested(rate):
            good = b.try_rate(rate, "confirm", 1)  # the third run decides
        failures = 0 if good else failures + 1


def _challenge(b: _Bracket) -> None:
    """Run the upper end again, since a slow moment of the machine may have caused it; if it falls, search above it."""
    for _ in range(_MOST_CHALLENGES):
        high = b.high
        if high is None or not b.low_holds() or b.beyond_doubt(high) or len(b.rows) >= _MOST_POINTS:
            return
        try:
            b.try_rate(high, "search", 1, whole=True)
            if b.contested(high):
                b.try_rate(high, "search", 1, whole=True)
        except _StoppedError as stopped:
            if stopped.final:
                raise
            return  # no time for it: the rest is for the interval
        if b.high == high:
            return
        _confirm(b)


def _repeat(b: _Bracket) -> None:
    """Run the confirmed answer again for its interval; if further runs outvote it, confirm a lower rate."""
    in_vain = 0  # disturbed runs do not count beside others, so they are limited
    while b.low_holds() and len(b.confirmations()) < CONFIRMATION_RUNS and len(b.rows) < _MOST_POINTS:
        if in_vain == CONFIRMATION_RUNS:
            return
        assert b.low is not None
        b.try_rate(b.low, "confirm", 1, whole=True)
        in_vain += b.rows[-1].disturbed
        if b.low is None and b.high is not None:
            _halve(b, b.high)
        if b.wide() or not b.low_holds():
            _confirm(b)


def _answer(b: _Bracket, configuration: str, workload: str) -> Answer:
    low, high, undecided = b.low, b.failed, b.undecided
    answer = Answer(
        configuration=configuration,
        workload=workload,
        rate=low,
        low=0.0,
        high=high,
        confirmed=b.low_holds(),
        provisional=False,
        binding="undecided" if high is None and undecided is not None else binding_of_search(b.counted, high),
        disturbance=b.disturbance(),
        undecided=undecided,
    )
    answer.provisional = bool(answer.disturbance)
    runs = [r for r in b.counted if r.rate == low and r.sustained]
    if not runs or low is None:
        answer.note = next((r.reason for r in reversed(b.rows) if not r.sustained), "nothing was measured")
        return answer
    repeated = b.confirmations()
    answer.low = _low_end(low, repeated, runs)
    answer.provisional = all(r.provisional for r in runs) or bool(answer.disturbance)
    answer.output_tok_s = runs[-1].output_tok_s
    notes = [f"at {r.rate:g} req/s: {r.reason}" for r in b.rows if r.rate == undecided and r.undecided][-1:]
    notes += [f"at {r.rate:g} req/s: {r.reason}" for r in b.counted if r.rate == high and not r.sustained][:1]
    if all(r.preemptions is None for r in runs):
        notes.append("the server has no preemption counter; backlog and completions decided")
    if len(repeated) >= CONFIRMATION_RUNS:
        seen = ", ".join(f"{r.achieved_rate:.4g}" for r in repeated)
        notes.append(f"confirmed in {len(repeated)} runs that completed {seen} req/s")
    answer.note = "; ".join(notes)
    return answer


def _low_end(rate: float, repeated: list[PointRow], runs: list[PointRow]) -> float:
    """The low end of the answer, from the rates that its runs completed.

    With enough confirmation runs it is the low end of the 95 % interval of the mean rate that they completed. With
    fewer, it is lower than the rate by the tolerance of the rules, a share of 1 / sqrt(requests).
    """
    requests = max([2, *(r.requests for r in runs)])
    if len(repeated) < CONFIRMATION_RUNS:
        return rate * (1 - 1 / math.sqrt(requests))
    done = [r.achieved_rate for r in repeated]
    resolution = rate / requests  # of a window: one request
    return max(0.0, min(rate - resolution, statistics.fmean(done) - half_interval(done)))


def answer_of_rates(rows: list[PointRow], configuration: str, workload: str) -> Answer:
    """The answer from given rates: the highest sustained one below the lowest that was not; never confirmed."""
    bracket = _Bracket(lambda _: None, precision=1.0, rows=rows, open_rows=[r for r in rows if r.undecided])
    return _answer(bracket, configuration, workload)
