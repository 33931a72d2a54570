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
