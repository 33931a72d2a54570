"""The events of a streamed message, put together by Anthropic's client, and the blocks of a whole one."""

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import anthropic
import pytest
from anthropic._models import construct_type
from anthropic.lib.streaming._messages import accumulate_event
from hypothesis import given
from hypothesis import strategies as st

from engine.api.chat_answers import AnswerOptions, DeltaReader
from engine.api.error_responses import ApiError
from engine.api.messages.output import MessageEvents, content_blocks
from engine.api.tools import ToolChoice
from engine.frontend.parsing.call_parser import CallParser
from engine.frontend.parsing.enforced_calls import EnforcedCall, EnforcedCalls
from engine.frontend.parsing.events import AnswerParser
from engine.frontend.parsing.json_calls import JsonFormat
from engine.frontend.parsing.reasoning import ReasoningParser, Tags
from engine.frontend.streams import Delta
from tests.engine.api.test_render import make_stream
from tests.engine.api.test_tools import CALL, OTHER

MAX_TOKENS = 100
PIECES = ["<think>", "</think>", CALL, OTHER, "<tool_call>", '{"name": ', "a", "\n", "é€", "</tool_call>"]
LIST = '[{"name": "f", "arguments": {"a": "x", "b": [1, {"c": null}]}}, {"name": "g", "arguments": {}}]'


def answer_parser() -> AnswerParser:
    calls = CallParser(JsonFormat(markers=("<tool_call>",), close="</tool_call>"))
    return ReasoningParser(Tags("<think>", "</think>"), calls, opened=False)


def reader(parser: AnswerParser, *, parallel: bool = True) -> DeltaReader:
    return DeltaReader(parser, AnswerOptions(choice=ToolChoice(tools={}, parallel=parallel)))


def split(text: str, cuts: Iterable[int]) -> list[str]:
    places = sorted({0, len(text), *(one for one in cuts if one < len(text))})
    return [text[begin:end] for begin, end in itertools.pairwise(places)] or [""]


def streamed(pieces: Sequence[str], read: DeltaReader, reason: str = "stop") -> list[dict[str, Any]]:
    """The events of a stream with these deltas of one token each."""
    events = MessageEvents(make_stream(), {"id": "x"}, read, MAX_TOKENS)
    deltas = [Delta(0, piece, [1]) for piece in pieces]
    deltas[-1].finish_reason = reason
    data = b"".join(events.render_all([one]) for one in deltas) + events.end()
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        kind, line = event.split("\n")
        found.append(json.loads(line.removeprefix("data: ")))
        assert kind == f"event: {found[-1]['type']}"
    return found


def accumulated(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks that Anthropic's client makes of the events."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in events:
        if event["type"] != "ping":
            parsed: Any = construct_type(type_=anthropic.types.RawMessageStreamEvent, value=event)  # type: ignore[arg-type]
            snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    return [one.to_dict() for one in snapshot.content]


def without_ids(blocks: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [dict(one) for one in blocks]
    ids = [one.pop("id") for one in found if one["type"] == "tool_use"]
    assert len(set(ids)) == len(ids)
    return found


def check_order(events: list[dict[str, Any]]) -> None:
    """Assert what clients rely on: each block begins, grows and ends, one after the other, between start and end."""
    kinds = [one["type"] for one in events]
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks = itertools.groupby(events[2:-2], lambda one: one["index"])
    for number, (index, of_block) in enumerate(blocks):
        first, *deltas, last = [one["type"] for one in of_block]
        assert (index, first, last) == (number, "content_block_start", "content_block_stop")
        assert set(deltas) <= {"content_block_delta"}


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), st.lists(st.integers(0, 400)), st.booleans())
def test_deltas_come_to_the_whole_message(text: str, cuts: list[int], parallel: bool):
    events = streamed(split(text, cuts), reader(answer_parser(), parallel=parallel))
    check_order(events)
    whole = content_blocks(reader(answer_parser(), parallel=parallel).read(text, final=True))
    assert without_ids(accumulated(events)) == without_ids(whole)
    texts = [one["text"] for one in whole if one["type"] == "text"]
    assert "" not in texts


@given(st.lists(st.integers(0, len(LIST))), st.integers(0, len(LIST)), st.booleans())
def test_enforced_calls_in_any_parts_and_cut_off_anywhere(cuts: list[int], end: int, named: bool):
    text, make = ('{"a": "x", "b": [1, {"c": null}]}', lambda: EnforcedCall("f")) if named else (LIST, EnforcedCalls)
    check_cut(text[:end], make, cuts, complete=end >= len(text))


def check_cut(text: str, make: Callable[[], AnswerParser], cuts: list[int], *, complete: bool) -> None:
    events = streamed(split(text, cuts), reader(make()), "stop" if complete else "length")
    check_order(events)
    whole = content_blocks(reader(make()).read(text, final=True))
    arguments: dict[int, str] = {}
    for one in events:
        if one["type"] == "content_block_delta":
            index = one["index"]
            arguments[index] = arguments.get(index, "") + one["delta"]["partial_json"]
    for index, block in enumerate(whole):
        written = arguments.get(index, "")
        assert written in text
        if complete or index < len(whole) - 1:
            assert block["input"] == json.loads(written)
        else:  # the members that are complete
            full = {"a": "x", "b": [1, {"c": None}]} if block["name"] == "f" else {}
            assert block["input"].items() <= full.items()
            assert ("a" in block["input"]) == ('"x"' in written)
    if complete:
        assert without_ids(accumulated(events)) == without_ids(whole)
        assert whole


def test_a_lone_surrogate_in_arguments_is_no_failure():
    [block] = content_blocks(reader(EnforcedCall("f")).read('{"a": "\\ud800", "b": 1}', final=True))
    assert block["input"] == {"a": "?", "b": 1}


@pytest.mark.parametrize(
    ("reason", "stop", "tokens", "shown"),
    [
        ("stop", None, 3, ("end_turn", None)),
        ("stop", 7, 3, ("end_turn", None)),
        ("stop", "END", 3, ("stop_sequence", "END")),
        ("length", None, MAX_TOKENS, ("max_tokens", None)),
        ("length", None, 3, ("model_context_window_exceeded", None)),
    ],
)
def test_reasons_of_the_end(reason: str, stop: Any, tokens: int, shown: tuple[str, Any]):
    events = MessageEvents(make_stream(), {}, reader(answer_parser()), MAX_TOKENS)
    events.render_all([Delta(0, "a", [1] * tokens, finish_reason=reason, stop_reason=stop)])
    *_, delta, _ = events.end().decode().split("\n\n")[:-1]
    end = json.loads(delta.split("data: ")[1])
    assert (end["delta"]["stop_reason"], end["delta"]["stop_sequence"]) == shown
    assert end["usage"]["output_tokens"] == tokens


def test_an_output_that_the_server_ends_fails():
    events = MessageEvents(make_stream(), {}, reader(answer_parser()), MAX_TOKENS)
    events.render_all([Delta(0, "a", [1], finish_reason="abort")])
    with pytest.raises(ApiError):
        events.end()
