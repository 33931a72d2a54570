"""When to schedule the next step while one is running.

If the next step is scheduled as soon as the running one begins, the device never idles, but a request that arrives in
the meantime waits for both steps. A long step therefore runs to three quarters before the next one is scheduled, which
then includes the requests that have arrived. If a step ends sooner than expected, the device idles while the next one
is scheduled.
"""

from dataclasses import dataclass

from engine.core.steps import ScheduledStep

SCHEDULE_AT = 0.75  # of the expected duration of the running step
MARGIN_S = 0.003  # at least this long before its expected end
SHORT_STEP_S = 0.006  # the step after a shorter one is scheduled at once
SMOOTHING = 0.2  # weight of the newest step


@dataclass(slots=True)
class _Average:
    """Smoothed duration and size of steps of one kind; 0.0 before the first."""

    seconds: float = 0.0
    tokens: float = 0.0


class StepTimer:
    """Averages how long steps take, with and without prefill, and derives when to schedule the next."""

    def __init__(self) -> None:
        self._averages = {True: _Average(), False: _Average()}
        self.next_schedule_at = 0.0  # when to schedule the step after the running one

    @property
    def decode_step_s(self) -> float:
        """The duration of a step without prefill; 0.0 while that isn't known."""
        return self._averages[False].seconds

    def start_step(self, now: float, step: ScheduledStep) -> None:
        """A step begins to run."""
        average = self._average_of(step)
        # At most the average: scheduling too early behind a longer step costs the device nothing.
        expected = average.seconds * min(1.0, step.num_tokens / average.tokens) if average.tokens else 0.0
        delay = min(SCHEDULE_AT * expected, expected - MARGIN_S) if expected > SHORT_STEP_S else 0.0
        self.next_schedule_at = now + delay

    def finish_step(self, step: ScheduledStep, seconds: float) -> None:
        """A step took `seconds` on the device."""
        if not step.num_tokens:  # it only freed slots
            return
        average = self._average_of(step)
        weight = SMOOTHING if average.tokens else 1.0
        average.seconds += weight * (seconds - average.seconds)
        average.tokens += weight * (step.num_tokens - average.tokens)

    def _average_of(self, step: ScheduledStep) -> _Average:
        return self._averages[step.num_tokens > len(step.slots)]  # slots that decode also sample
