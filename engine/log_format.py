"""The form of log lines, the same in all processes of a server: text, or one JSON object a line (`--log-format`)."""

import logging
import os
from datetime import UTC, datetime
from typing import Any

import msgspec

VARIABLE = "REDLINE_LOG_FORMAT"  # set by the first process, inherited by the others
FORMATS = ("text", "json")


class JsonFormatter(logging.Formatter):
    """One JSON object for each record; a record's `fields` (an `extra` of the call) are fields of the object."""

    def __init__(self, fields: dict[str, Any]):
        """`fields` are those of all lines."""
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": record.process,
            **self._fields,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


def make_formatter(**fields: Any) -> logging.Formatter:
    """The formatter of this process; `fields` name it in each line, as in `rank=1`."""
    if is_json():
        return JsonFormatter(fields)
    name = "".join(f" {field} {value}" for field, value in fields.items())
    return logging.Formatter(f"%(levelname)s %(asctime)s %(name)s{name}: %(message)s")


def log_everything(level: int, **fields: Any) -> None:
    """Write the logs of this process to stderr, those of libraries included."""
    handler = logging.StreamHandler()
    handler.setFormatter(make_formatter(**fields))
    logging.basicConfig(level=level, handlers=[handler])


def log_to_stderr() -> None:
    """Write Redline's log of this process to stderr, without the logs of libraries."""
    handler = logging.StreamHandler()
    handler.setFormatter(make_formatter())
    redline = logging.getLogger("redline")
    redline.handlers = [handler]
    redline.propagate = False
    redline.setLevel(logging.INFO)


def is_json() -> bool:
    """Whether log lines are JSON."""
    return os.environ.get(VARIABLE) == "json"
