"""The search for the highest sustained rate: doubling, bisection, confirmation. It has no sockets and no clock.

`measure` runs one load point and returns its record, or None if no further one can be run (the time is up, or the user
stopped the run). The search then returns what it has found so far.
"""

import contextlib
import math
import statistics

from bench.results import Answer, PointRecord
from bench.search.bracket import CONFIRMATION_RUNS, Bracket, Measure, StoppedError
from bench.search.criteria import binding_of_search
from bench.statistics.student import half_interval

_MOST_DOUBLINGS = 20
_MOST_HALVINGS = 6
_MOST_CONFIRMATIONS = 10
_MOST_RECHECKS = 4
_MOST_POINTS = 60
_MOST_PASSED = 2  # consecutive undecided rates that the doubling passes over


def find_sustained(
    measure: Measure, *, start_rate: float, precision: float, configuration: str = "", workload: str = ""
) -> tuple[Answer, list[PointRecord]]:
    """Search from `start_rate` (requests/s) until the bracket is within `precision` and its lower end is confirmed.

    Returns the answer and the load points that it rests on, in the order of measurement.
    """
    bracket = Bracket(measure, precision)
    try:
        _double(bracket, start_rate)
        _confirm(bracket)
        _recheck_upper_end(bracket)
        _repeat(bracket)
    except StoppedError as stopped:
        if not stopped.final:
            bracket.narrow = False
            with contextlib.suppress(StoppedError):
                _measure_lowest_again(bracket)
                _confirm(bracket)
    return _answer(bracket, configuration, workload), bracket.records


def _double(b: Bracket, start_rate: float) -> None:
    rate = start_rate
    # Undecided rates are passed over while doubling; bisection measures them again if they matter.
    passed = 0
    for doubling in range(_MOST_DOUBLINGS + 1):
        points_left = 3 + (not doubling) + b.bisections()
        if passed < _MOST_PASSED:
            record = b.try_once(rate, "search", points_left)
            passed = passed + 1 if record.undecided else 0
            overloaded = not record.sustained and not record.undecided
        else:
            passed, overloaded = 0, not b.try_rate(rate, "search", points_left)
        if overloaded:
            break
        rate *= 2
    else:
        b.narrow = False  # no upper end was found
    if b.low is None:
        _halve(b, rate)


def _measure_lowest_again(b: Bracket) -> None:
    """If the time for searching ended before any rate was decided, run the lowest rate again in the time left."""
    lowest = min((record.rate for record in b.records), default=None)
    if b.low is None and lowest is not None and all(record.undecided for record in b.records if record.rate == lowest):
        b.open_records = [record for record in b.open_records if record.rate != lowest]  # replaced by a longer window
        b.try_rate(lowest, "confirm", 1)


def _halve(b: Bracket, rate: float) -> None:
    for _ in range(_MOST_HALVINGS):
        rate /= 2
        if b.try_rate(rate, "search", 3 + b.bisections()):
            return


def _bisect(b: Bracket) -> None:
    while b.narrow and b.low is not None and len(b.records) < _MOST_POINTS:
        if b.high is None:
            b.try_rate(b.low * (1 + b.precision) ** 2, "search", 2)  # the upper end turned out to be sustained
        elif b.wide():
            b.try_rate(math.sqrt(b.low * b.high), "search", b.bisections() + 1)
        elif b.high_uncertain():
            b.try_rate(b.high, "search", 2)
        else:
            return


def _confirm(b: Bracket) -> None:
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


def _recheck_upper_end(b: Bracket) -> None:
    """Run the upper end again, in case a slow moment of the machine caused it. If it is sustained, go on above it."""
    for _ in range(_MOST_RECHECKS):
        high = b.high
        if high is None or not b.low_holds() or b.is_certain(high) or len(b.records) >= _MOST_POINTS:
            return
        try:
            b.try_rate(high, "search", 1, whole=True)
            if b.contested(high):
                b.try_rate(high, "search", 1, whole=True)
        except StoppedError as stopped:
            if stopped.final:
                raise
            return  # no time for it: the rest is for the interval
        if b.high == high:
            return
        _confirm(b)


def _repeat(b: Bracket) -> None:
    """Run the confirmed answer again for its interval. If most runs then fail, confirm a lower rate."""
    wasted = 0  # disturbed runs are not counted if there are others, so they are limited
    while b.low_holds() and len(b.confirmations()) < CONFIRMATION_RUNS and len(b.records) < _MOST_POINTS:
        if wasted == CONFIRMATION_RUNS:
            return
        assert b.low is not None
        b.try_rate(b.low, "confirm", 1, whole=True)
        wasted += b.records[-1].disturbed
        if b.low is None and b.high is not None:
            _halve(b, b.high)
        if b.wide() or not b.low_holds():
            _confirm(b)


def _answer(b: Bracket, configuration: str, workload: str) -> Answer:
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
        answer.note = next((r.reason for r in reversed(b.records) if not r.sustained), "nothing was measured")
        return answer
    repeated = b.confirmations()
    answer.low = _low_end(low, repeated, runs)
    answer.provisional = all(r.provisional for r in runs) or bool(answer.disturbance)
    answer.output_tok_s = runs[-1].output_tok_s
    notes = [f"at {r.rate:g} req/s: {r.reason}" for r in b.records if r.rate == undecided and r.undecided][-1:]
    notes += [f"at {r.rate:g} req/s: {r.reason}" for r in b.counted if r.rate == high and not r.sustained][:1]
    if all(r.preemptions is None for r in runs):
        notes.append("the server has no preemption counter: backlog and completions decided")
    if len(repeated) >= CONFIRMATION_RUNS:
        seen = ", ".join(f"{r.achieved_rate:.4g}" for r in repeated)
        notes.append(f"confirmed in {len(repeated)} runs that completed {seen} req/s")
    answer.note = "; ".join(notes)
    return answer


def _low_end(rate: float, repeated: list[PointRecord], runs: list[PointRecord]) -> float:
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


def answer_of_rates(records: list[PointRecord], configuration: str, workload: str) -> Answer:
    """The answer from given rates: the highest sustained one below the lowest that was not; never confirmed."""
    bracket = Bracket(lambda _: None, precision=1.0, records=records, open_records=[r for r in records if r.undecided])
    return _answer(bracket, configuration, workload)
