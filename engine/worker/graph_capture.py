"""Captures the steps of a runner one by one while it serves.

The server is up before the first one is captured. Each is a call to the ranks like loading an adapter: it runs between
two steps, at the same place on all ranks. While no step is submitted one capture follows the other; otherwise there is
a pause after each, so that captures, of a few tenths of a second, take a small share of the time.
"""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

from engine.errors import RedlineError

log = logging.getLogger("redline.worker")

BUSY_PAUSE_S = 1.0


class GraphCapture:
    """A thread that calls `capture_graph` of an executor until nothing is left.

    Args:
        call: calls a method of the ranks between two steps.
        num_steps: how many steps have been submitted.
    """

    def __init__(self, call: Callable[[str, dict[str, Any]], "Future[Any]"], num_steps: Callable[[], int]):
        self._call = call
        self._num_steps = num_steps
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="graph capture", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ended.is_set():
                before = self._num_steps()
                if not self._call("capture_graph", {}).result():
                    return
                if self._num_steps() != before:
                    self._ended.wait(BUSY_PAUSE_S)
        except (CancelledError, RuntimeError, RedlineError):  # expected when the executor is shut down
            level = logging.DEBUG if self._ended.is_set() else logging.WARNING
            log.log(level, "no more steps are captured", exc_info=True)

    def close(self) -> None:
        """Begin no other capture. The one in progress ends with the executor."""
        self._ended.set()
