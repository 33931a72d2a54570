"""The answers of a rank on an asynchronous device, from a thread that waits for the device."""

import threading
from queue import SimpleQueue
from types import TracebackType
from typing import Self

from engine.worker.device_runner import PendingResult
from engine.worker.rank_links import RankEnd
from engine.worker.rank_protocol import FrameKind

JOIN_S = 1.0  # for the thread, once something else has failed


class DeviceAnswers:
    """Sends answers in the order of the commands; a context, whose end waits for the answers that were put.

    A result of a step is sent once the device has computed it, and the answers to later commands after it: nothing
    waits for those before it has the result. If the device fails, commands are no longer received, and the end of the
    context raises the error.

    Args:
        end: of the rank's link.
        sends: false for ranks that only notice the failure of their device.
    """

    def __init__(self, end: RankEnd, *, sends: bool):
        self._end = end
        self._sends = sends
        self._answers: SimpleQueue[tuple[FrameKind, bytes | PendingResult] | None] = SimpleQueue()
        self._sending = threading.Lock()
        self._given_up = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def put(self, kind: FrameKind, answer: bytes | PendingResult) -> None:
        """Queue the answer to the next command."""
        self._answers.put((kind, answer))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with self._sending:  # the report of the error must not meet half an answer
                self._given_up = True
        self._answers.put(None)
        # After an error the device may never compute what it has been given.
        self._thread.join(None if error is None else JOIN_S)
        if error is None and self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while (answer := self._answers.get()) is not None:
                kind, body = answer
                encoded = body if isinstance(body, bytes) else body.finish()
                with self._sending:
                    if self._given_up:
                        return
                    if self._sends:
                        self._end.send(kind, encoded)
        except BaseException as error:
            self._error = error
            self._end.interrupt()
