"""A process of the pool: `python -m engine.multimodal.pool_process`, started and ended by a front end.

It decodes and processes one input at a time and writes the tensors to a feature file. It runs at a lower priority than
the engine, in one thread. When its front end is gone it removes the feature files that nobody owns any longer.
"""

import contextlib
import os
import socket
import sys
import threading

from engine import children
from engine.children import Failure
from engine.errors import RedlineError, cause_of
from engine.multimodal.feature_files import remove_folders_of_killed
from engine.multimodal.pool_protocol import Done, Failed, PoolOptions, Started, decode_job, encode, receive
from engine.multimodal.processing import make_processor, resident_bytes, run_job

NICE = 10  # the loops of front end, core and workers come first


def serve(options: PoolOptions, connection: socket.socket) -> None:
    """Run jobs until the other end closes."""

    def send(answer: Started | Done | Failed) -> None:
        connection.sendall(children.frame(encode(answer)))

    try:
        processor = make_processor(options)
    except Exception as error:  # reported to the front end, which fails the jobs that wait
        send(Failed(Failure.of(error if isinstance(error, RedlineError) else RedlineError(cause_of(error)))))
        return
    send(Started(resident_bytes()))
    while (head := receive(connection)) is not None:
        data = receive(connection)
        if data is None:
            return
        send(run_job(processor, options.limits, decode_job(head), bytes(data)))
        del data


def end_with_parent() -> threading.Thread:
    """Watch stdin; once the parent has ended, remove the folders that nobody owns any longer and end."""

    def wait() -> None:
        try:
            while os.read(sys.stdin.fileno(), 4096):
                pass
            remove_folders_of_killed()
        finally:
            os._exit(1)

    watch = threading.Thread(target=wait, name="parent-watch", daemon=True)
    watch.start()
    return watch


def main() -> int:
    """The process, from its options on stdin to its end."""
    options = children.read_options(PoolOptions)
    if options is None:
        return 1
    os.nice(NICE)
    watch = end_with_parent()
    with socket.socket(fileno=options.socket) as connection:
        with contextlib.suppress(OSError):  # the front end is gone
            serve(options, connection)
        watch.join()  # the front end kills this process, or is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
