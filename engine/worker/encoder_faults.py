"""Faults of encoders end the requests that need the input, not the engine: their causes, which all ranks must share.

The tower is the same on every rank, so a fault usually occurs on all of them. If it occurs on some only (one has no
memory left, say), the others must not use their embeddings: ranks compute the same step with the same numbers. See
`engine.worker.rank_causes`.
"""

import logging
from collections.abc import Callable

from engine.errors import INTERRUPTS, cause_of

log = logging.getLogger("redline.worker")


def error_of(encode: Callable[[], None]) -> str:
    """Why an input could not be encoded; empty: it was."""
    try:
        encode()
    except INTERRUPTS:
        raise
    except BaseException as error:
        log.exception("a multimodal input could not be encoded")
        return cause_of(error)
    return ""
