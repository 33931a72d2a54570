"""How often, and after which pauses, a process that ended by itself is started again."""

from collections import deque

MAX_RESTARTS = 5  # of an API process, or a replica of several, within the period
RESTART_PERIOD_S = 600.0
BACK_OFF_S = 0.5  # before the first restart; doubled before each further one that follows without any work done
MAX_BACK_OFF_S = 30.0


class RestartPolicy:
    """The restarts of one process: after more than `limit` within the period there are no more, for the next would end
    too."""

    def __init__(self, limit: int = MAX_RESTARTS):
        self.limit = limit
        self._ends: deque[float] = deque()  # times at which the process ended by itself
        self._in_a_row = 0  # of these, the last ones before which it had not worked

    def next_pause(self, now: float, *, worked: bool = False) -> float | None:
        """The process has ended: seconds until it is to be started again; None if it ended too often.

        `worked`: it had done work since its start, so the pause is the shortest.
        """
        self._ends.append(now)
        while now - self._ends[0] > RESTART_PERIOD_S:
            self._ends.popleft()
        count = len(self._ends)
        self._in_a_row = 1 if worked else min(self._in_a_row + 1, count)
        return None if count > self.limit else min(BACK_OFF_S * 2.0 ** (self._in_a_row - 1), MAX_BACK_OFF_S)

    @property
    def has_ended(self) -> bool:
        """Whether it ended by itself within the period."""
        return bool(self._ends)

    def why_not(self) -> str:
        """Why it is not started again, to follow the cause of its last end."""
        return f"it ended {len(self._ends)} times within {RESTART_PERIOD_S:g} s and is not restarted"
