"""Items of outputs, however the text is divided into deltas."""

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engine.api.chat_answers import AnswerOptions, DeltaReader
from engine.api.responses.output import Event, OutputItems
from engine.api.tools import ToolChoice
from engine.frontend.parsing.call_parser import CallParser
from engine.frontend.parsing.json_calls import JsonFormat
from engine.frontend.parsing.reasoning import ReasoningParser, Tags
from engine.frontend.streams import Delta

CALL = '<tool_call>{"name": "f", "arguments": {"a": "ä</b>"}}</tool_call>'
PIECES = ["<think>", "</think>", CALL, "<tool_call>", '{"name": "f"', "</tool_call>", " ", "\n", "text", "é", "{", "}"]
texts = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
reasons = st.sampled_from(["stop", "length"])


def new_items(*, parsed: bool) -> OutputItems:
    if not parsed:
        return OutputItems(None)
    calls = CallParser(JsonFormat(markers=("<tool_call>",), close="</tool_call>"))
    parser = ReasoningParser(Tags("<think>", "</think>"), calls, opened=False)
    return OutputItems(DeltaReader(parser, AnswerOptions(choice=ToolChoice(tools={"f": {}}))))


def read(text: str, cuts: list[int], reason: str, *, parsed: bool) -> tuple[OutputItems, list[Event]]:
    output = new_items(parsed=parsed)
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events: list[Event] = []
    for begin, end in itertools.pairwise(bounds):
        events += output.add(Delta(0, text[begin:end], [1]))
    events += output.add(Delta(0, "", [], finish_reason=reason))
    return output, events


def without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


@given(texts, st.lists(st.integers(0, 200), max_size=12), reasons, st.booleans())
def test_deltas_add_up_to_items_which_do_not_depend_on_them(
    text: str, cuts: list[int], reason: str, parsed: bool
) -> None:
    output, events = read(text, cuts, reason, parsed=parsed)
    whole, _ = read(text, [], reason, parsed=parsed)
    assert [*map(without_ids, output.items)] == [*map(without_ids, whole.items)]
    assert output.items
    assert output.num_tokens == len(cuts) + 1
    assert [one["item"] for one in events if one["type"] == "response.output_item.done"] == output.items
    for index, item in enumerate(output.items):
        own = [one for one in events if one["output_index"] == index]
        added = own[0]["item"]
        assert (added["id"], added["status"]) == (item["id"], "in_progress")
        assert not added.get("content")
        assert not added.get("arguments")
        streamed = "".join(one["delta"] for one in own if one["type"].endswith(".delta"))
        assert streamed == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    last = output.items[-1]["status"]
    assert all(one["status"] == "completed" for one in output.items[:-1])
    assert last == "completed" or reason == "length"


def test_a_plain_text_is_one_message() -> None:
    output, _ = read("<think>a" + CALL, [3], "stop", parsed=False)
    [item] = output.items
    assert (item["type"], item["content"][0]["text"]) == ("message", "<think>a" + CALL)
