"""Log lines as text and as JSON."""

import json
import logging
import sys

import pytest

from engine.frontend.listener import OutputRecord
from engine.frontend.logs import log_request
from engine.log_format import VARIABLE, JsonFormatter, make_formatter

ENDED = OutputRecord("cmpl-1", 0, 'm"', "c", 0, 1, 0, 2, "stop", 0.5, None, 1.0, 0.0)


def record(message: str, *arguments: object, **more: object) -> logging.LogRecord:
    made = logging.LogRecord("redline.test", logging.WARNING, __file__, 1, message, arguments, None)
    vars(made).update(more)
    return made


def test_a_json_line_has_the_message_and_where_it_comes_from():
    line = JsonFormatter({"rank": 1}).format(record("%d lost,\n%s", 3, "really"))
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    assert found.pop("process") > 0
    assert found == {"level": "WARNING", "logger": "redline.test", "rank": 1, "message": "3 lost,\nreally"}


def test_fields_and_exceptions_are_in_the_object():
    try:
        raise ValueError("odd")
    except ValueError:
        line = JsonFormatter({}).format(record("failed", fields={"count": 2, "what": object}, exc_info=sys.exc_info()))
    found = json.loads(line)
    assert (found["count"], found["message"]) == (2, "failed")
    assert "ValueError: odd" in found["exception"]


def test_text_is_as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    line = make_formatter(rank=3).format(record("lost"))
    assert line.startswith("WARNING ")
    assert line.endswith(" redline.test rank 3: lost")


def test_the_record_of_a_request_is_an_object_of_its_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv(VARIABLE, "json")
    with caplog.at_level(logging.INFO, "redline.request"):
        log_request(ENDED)
    found = json.loads(make_formatter().format(caplog.records[0]))
    assert found["message"] == "cmpl-1 ended"
    assert (found["request"]["request"], found["request"]["ttft_s"]) == ("cmpl-1", 0.5)
