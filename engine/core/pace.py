"""When to plan the next step, while one is running.

Planned as soon as a step begins, the next one leaves the device no gap, but a request that comes meanwhile waits for
both. So the next is planned when most of the running one should be over: in time, and with everyone who has come by
then. A step that is over sooner than expected costs the device the time of a plan.
"""

from dataclasses import dataclass

from engine.core.plan import Plan

LATE = 0.75  # of the running step is over by then
SLACK_S = 0.003  # before its end at least
SHORT_S = 0.006  # not worth another look at who has come
SMOOTHING = 0.2  # weight of the newest step


@dataclass(slots=True)
class _Usual:
    """Steps of one kind, smoothed; 0.0 while none is known."""

    seconds: float = 0.0
    tokens: float = 0.0


class Pace:
    """How long steps take, those that compute parts of prompts and the others, and when to plan the next."""

    def __init__(self) -> None:
        self._usual = {True: _Usual(), False: _Usual()}
        self.plan_at = 0.0  # when to plan the step after the running one

    @property
    def decode_s(self) -> float:
        """What a step takes that only decodes; 0.0 while that isn't known."""
        return self._usual[False].seconds

    def begin(self, now: float, plan: Plan) -> None:
        """A step begins to run."""
        usual = self._usual_of(plan)
        # Never more than usual: a step that takes longer is planned behind too early, which costs the device nothing.
        expected = usual.seconds * min(1.0, plan.num_tokens / usual.tokens) if usual.tokens else 0.0
        self.plan_at = now + min(LATE * expected, expected - SLACK_S) if expected > SHORT_S else now

    def end(self, plan: Plan, seconds: float) -> None:
        """A step has taken so long on the device."""
        if not plan.num_tokens:  # it only told of rows that are free
            return
        usual = self._usual_of(plan)
        weight = SMOOTHING if usual.tokens else 1.0
        usual.seconds += weight * (seconds - usual.seconds)
        usual.tokens += weight * (plan.num_tokens - usual.tokens)

    def _usual_of(self, plan: Plan) -> _Usual:
        return self._usual[plan.num_tokens > len(plan.rows)]  # who decodes samples too
