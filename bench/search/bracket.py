"""The state of a search: the load points measured so far, and the rates between which the answer lies."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.results import Phase, PointRecord

_MOST_DISTURBED = 2
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


Measure = Callable[[Trial], PointRecord | None]


class StoppedError(Exception):
    """No further load point; not `final` if only the time for searching is over and a confirmation may still fit."""

    def __init__(self, final: bool):
        self.final = final


@dataclass(slots=True)
class Bracket:
    """The load points so far, and the rates between which the answer lies."""

    measure: Measure
    precision: float
    records: list[PointRecord] = field(default_factory=list)
    disturbed_again: list[bool] = field(default_factory=list)  # for each repetition of a disturbed load point
    narrow: bool = True  # False: there is no time left to narrow the bracket
    extended: list[PointRecord] = field(default_factory=list)  # measured in longer windows than planned
    open_records: list[PointRecord] = field(default_factory=list)  # undecided in the longest window that time allowed

    def try_rate(self, rate: float, phase: Phase, points_left: int, *, whole: bool = False) -> bool:
        """Measure one rate, in longer windows while it is undecided; returns whether it is sustained.

        A rate that is still undecided counts as not sustained. A load point that is invalid because of the client is
        run once more, then it counts as not sustained too.
        """
        rate = round_rate(rate)
        record = self.try_once(rate, phase, points_left, whole=whole)
        for _ in range(_MOST_EXTENSIONS if record.undecided else 0):
            longer = self._run(rate, phase, points_left, whole, 2 * record.window_s)
            if longer is None:
                break
            record = longer
            if not record.undecided:
                break
        if record.undecided:
            self.open_records.append(record)
        return bool(record.sustained)

    def try_once(self, rate: float, phase: Phase, points_left: int, *, whole: bool = False) -> PointRecord:
        """Measure one rate in one window, which may leave it undecided.

        It is measured again if it was invalid because of the client or disturbed, as time allows.
        """
        rate = round_rate(rate)
        record = self._run(rate, phase, points_left, whole)
        if record is None:
            raise StoppedError(final=phase == "confirm")
        if record.sustained is None and not record.undecided and sum(1 for r in self.records if r.rate == rate) == 1:
            again = self._run(rate, phase, points_left, whole)
            if again is None:
                raise StoppedError(final=phase == "confirm")
            return again
        return self._run_undisturbed(record, phase) if record.disturbed and self._repeats_help() else record

    def _repeats_help(self) -> bool:
        """Whether repeating a disturbed load point is useful: not if the last repetitions were disturbed as well."""
        return len(self.disturbed_again) < _MOST_DISTURBED or not all(self.disturbed_again[-_MOST_DISTURBED:])

    def _run_undisturbed(self, record: PointRecord, phase: Phase) -> PointRecord:
        try:
            again = self._run(record.rate, phase, 1, whole=True)
        except StoppedError:
            return record
        if again is None:
            return record  # no time for a repetition: the verdict counts, and the answer is provisional
        self.disturbed_again.append(again.disturbed)
        if again.disturbed and again.sustained != record.sustained and record.sustained:
            return record if self._votes().get(record.rate, 0) > 0 else again
        return again

    def _run(
        self, rate: float, phase: Phase, points_left: int, whole: bool, window_s: float = 0.0
    ) -> PointRecord | None:
        repeat = sum(1 for r in self.records if r.rate == rate)
        record = self.measure(Trial(rate, phase, repeat, points_left, whole, window_s))
        if record is None:
            return None
        self.records.append(record)
        if window_s:
            self.extended.append(record)
        if record.sustained is None and not record.undecided and record.binding != "client":
            raise StoppedError(final=True)  # out of time, or invalid for a reason that other rates share
        return record

    @property
    def counted(self) -> list[PointRecord]:
        """The load points that count: a disturbed one does not if its rate has an undisturbed one with a verdict."""
        undisturbed = {r.rate for r in self.records if r.sustained is not None and not r.disturbed}
        return [r for r in self.records if not (r.disturbed and r.rate in undisturbed)]

    @property
    def high(self) -> float | None:
        """The lowest rate that was not shown to be sustained."""
        return min((rate for rate, votes in self._votes().items() if votes <= 0), default=None)

    @property
    def failed(self) -> float | None:
        """The lowest rate above the lower end that was measured as not sustained."""
        low = self.low or 0.0
        bad = (rate for rate, votes in self._votes().items() if votes <= 0 and rate > low)
        return min((rate for rate in bad if any(self._failed(r) for r in self.records if r.rate == rate)), default=None)

    @property
    def undecided(self) -> float | None:
        """The lowest undecided rate between `low` and `failed`."""
        low, failed = self.low or 0.0, self.failed
        between = (r.rate for r in self.records if r.undecided and r.rate > low and (failed is None or r.rate < failed))
        return min(between, default=None)

    @staticmethod
    def _failed(record: PointRecord) -> bool:
        return record.sustained is False or (record.sustained is None and record.binding == "client")

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

        Runs with short windows count only if the rate has no run with a whole window. A rate whose every run was
        undecided, one of them in the longest window that time allowed, counts as not sustained.

        Example: a rate with whole runs "sustained", "not sustained" and a short run "not sustained" has 0 votes.
        """
        most = self._most(self.records)
        whole: dict[float, int] = {}
        short: dict[float, int] = {}
        judged = {record.rate for record in self.records if record.sustained is not None}
        for record in self.counted:
            if record.undecided and (record.rate in judged or not any(record is one for one in self.open_records)):
                continue
            invalid = record.sustained is None and not record.undecided
            if invalid and (record.binding != "client" or record.rate in judged):
                continue
            votes = short if 2 * record.requests < most and not _is_clear(record) else whole
            votes[record.rate] = votes.get(record.rate, 0) + (1 if record.sustained else -1)
        return short | whole

    def _most(self, records: list[PointRecord]) -> int:
        """The number of requests of the longest window that was not extended."""
        return max((r.requests for r in records if not any(r is other for other in self.extended)), default=0)

    def wide(self) -> bool:
        low, high = self.low, self.high
        if low is None or high is None or not self.narrow:
            return False
        return high / low > (1 + self.precision) * 1.001  # rates are rounded to four digits

    def high_uncertain(self) -> bool:
        """Whether the upper end rests on one short window of the doubling with a backlog that hardly grew."""
        runs = [r for r in self.counted if r.rate == self.high]
        if len(runs) != 1 or not self.narrow or _is_clear(runs[0]):
            return False
        return 2 * runs[0].requests < self._most(self.records)

    def is_certain(self, rate: float) -> bool:
        """Whether a rate failed more than once, or so clearly that a slow moment of the machine is not the cause."""
        runs = [r for r in self.counted if r.rate == rate and r.sustained is False]
        return len(runs) != 1 or _is_clear(runs[0], _CLEAR_OVERLOAD)  # no runs: the client was the limit

    def low_holds(self) -> bool:
        """Whether the lower end is confirmed: by a confirmation run, or by a second run with other requests."""
        runs = [r for r in self.counted if r.sustained and r.rate == self.low]
        return len(runs) > 1 or any(r.phase == "confirm" for r in runs)

    def confirmations(self) -> list[PointRecord]:
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


def _is_clear(record: PointRecord, times_noise: float = 2.0) -> bool:
    """Whether a load point is so clearly not sustained that a longer window would not change its verdict."""
    hard = record.preemptions or record.failed or record.binding in ("client", "latency limit")
    return not record.sustained and bool(hard or record.backlog_growth >= times_noise * record.backlog_noise)


def round_rate(rate: float) -> float:
    """The rate with four significant digits, as in result files and seeds."""
    return float(f"{rate:.4g}")


def bisections(ratio: float, precision: float) -> int:
    """The number of bisections that narrow a bracket with high/low = `ratio` to `precision`."""
    return max(0, math.ceil(math.log2(max(1.0, math.log(ratio) / math.log1p(precision))) - 1e-9))
