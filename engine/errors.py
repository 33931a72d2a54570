"""Errors that a user can fix: each message is one line with the cause and the flag or field to change."""


class RedlineError(Exception):
    """An error with a cause outside the code; shown as one line, without a traceback. `exit_code` is the command's."""

    exit_code = 1


class ConfigError(RedlineError):
    """A flag or setting has an invalid value."""

    exit_code = 2


class ModelError(RedlineError):
    """A model can't be found, read or run."""


class OutOfMemoryError(RedlineError):
    """There is too little memory for the configuration."""


class EngineDeadError(RedlineError):
    """The EngineCore ended; the message is the cause."""


class RequestError(RedlineError):
    """A request can't be served; the engine continues. `field` is the field of the request to change."""

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


class ContextLengthError(RequestError):
    """A prompt is longer than the model serves."""

    @classmethod
    def of(cls, max_model_len: int, found: str, field: str) -> "ContextLengthError":
        """The error with words by which clients recognize it: OpenAI's and vLLM's, and Anthropic's.

        Args:
            max_model_len: in tokens.
            found: what the prompt has.
            field: to change.
        """
        limit = f"this model's maximum context length is {max_model_len} tokens (--max-model-len)"
        return cls(f"{limit}, but the prompt is too long: {found}", field)


class OverloadedError(RedlineError):
    """Too much of something waits; the same request may be served later."""


class ProcessingError(RedlineError):
    """A multimodal input could not be processed, through no fault of its request; the engine continues."""


class SharedMemoryFullError(ProcessingError):
    """The features of a multimodal input do not fit into shared memory."""


class NotServedError(RequestError):
    """A request names a model or an adapter that is not served (any longer)."""


# Exceptions that are not caught where an error ends one request only. All others are, BaseExceptions included: a panic
# in a Rust library is one.
INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)

_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")
_MEMORY_ADVICE = "out of memory: lower --kv-cache-memory-bytes, --max-num-batched-tokens or --max-num-seqs"


def cause_of(error: BaseException) -> str:
    """An error in one line for the user: the message of a RedlineError, or the class and message of another error."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, RedlineError):
        return str(error)
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in _MEMORY):
        return f"{cause} ({_MEMORY_ADVICE})"
    return cause
