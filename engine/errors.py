"""Errors a user can mend: each message is one line that names the cause and the flag or field to change."""


class RedlineError(Exception):
    """A cause outside the code: shown as one line, without a traceback; `exit_code` is the command's."""

    exit_code = 1


class ConfigError(RedlineError):
    """A flag or setting that can't hold."""

    exit_code = 2


class ModelError(RedlineError):
    """A model that can't be found, read or run."""


class OutOfMemoryError(RedlineError):
    """Too little memory for what was asked."""


class EngineDeadError(RedlineError):
    """The EngineCore ended; the message says why."""


class RequestError(RedlineError):
    """One request can't be served; the engine goes on. `field` names the request's field to change."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class NotServedError(RequestError):
    """A request names a model or an adapter that isn't served, or no longer."""


# What passes through a guard around one request; a panic inside a library in Rust is a BaseException, and is caught.
INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)

_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")
_MEMORY_ADVICE = "out of memory: lower --kv-cache-memory-bytes, --max-num-batched-tokens or --max-num-seqs"


def cause_of(error: BaseException) -> str:
    """An error in one line, for people: a RedlineError in its own words, anything else with its class."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, RedlineError):
        return str(error)
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _MEMORY):
        return f"{cause} ({_MEMORY_ADVICE})"
    return cause
