"""Signals that ask a server to end, and the exit codes that follow from them."""

import time

# `timeout` and some supervisors signal the process and then its whole group. The second signal, microseconds later,
# does not mean that the server shall end at once.
SAME_REQUEST_S = 0.25


def exit_code_of(number: int) -> int:
    """The exit code of a process that a signal has ended, as shells report it: 130 for SIGINT, 143 for SIGTERM."""
    return 128 + number


class EndSignal(KeyboardInterrupt):
    """A signal asked the process to end; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class EndRequests:
    """Counts requests to end. A signal that follows the same one at once is part of the same request."""

    def __init__(self) -> None:
        self.count = 0
        self.number = 0  # the signal of the last request
        self._at = 0.0

    def add(self, number: int) -> bool:
        """Add a signal, received now; returns whether it is a request of its own."""
        now = time.monotonic()
        if self.count and number == self.number and now - self._at < SAME_REQUEST_S:
            return False
        self.count += 1
        self.number, self._at = number, now
        return True
