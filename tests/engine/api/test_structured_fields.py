"""The fields that constrain an output, in all of their forms."""

import asyncio
import re
from typing import Any

import msgspec
import pytest

from engine.api.parsing import parse
from engine.api.protocol import CompletionRequest
from engine.errors import RequestError
from engine.frontend import structured_outputs
from engine.frontend.structured_outputs import StructuredOutputs
from engine.grammar import TOO_MANY, Grammar
from tests.engine.api.conftest import InLoop

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


def wanted(**fields: Any) -> StructuredOutputs | None:
    body = parse(msgspec.json.encode({"prompt": "a", **fields}), CompletionRequest)
    return body.params({}).structured_outputs


def test_forms_that_mean_the_same() -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    forms = [
        wanted(response_format=schema),
        wanted(structured_outputs={"json": SCHEMA}),
        wanted(structured_outputs={"json": msgspec.json.encode(SCHEMA).decode()}),
        wanted(guided_json=SCHEMA),
    ]
    assert len({one.to_grammar() for one in forms if one is not None}) == 1
    assert None not in forms
    assert wanted(response_format={"type": "text"}) is None
    assert wanted() is None
    objects = [wanted(response_format={"type": "json_object"}), wanted(structured_outputs={"json_object": True})]
    assert len({one.to_grammar() for one in objects if one is not None}) == 1
    assert wanted(guided_regex="a+") == StructuredOutputs(regex="a+", field="guided_regex")
    assert wanted(guided_choice=["a"]) == StructuredOutputs(choice=["a"], field="guided_choice")
    assert wanted(structured_outputs={"grammar": "g"}) == StructuredOutputs(grammar="g")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a", "json": SCHEMA}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp"),
        ({"structured_outputs": {"structural_tag": {"triggers": []}}}, "structured_outputs"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_json": "{"}, "guided_json"),
    ],
)
async def test_contradictions_are_refused_by_name(server: InLoop, fields: dict[str, Any], field: str) -> None:
    for path, body in BODIES.items():
        error = await server.refusal(path, body | fields)
        assert error["param"] == field
    assert not server.core.has_work


@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_that_can_not_be_compiled_is_refused_before_a_stream_begins(
    server: InLoop, stream: bool
) -> None:
    for path, body in BODIES.items():
        for fields, field in (
            ({"structured_outputs": {"regex": "a(b"}}, "structured_outputs"),
            ({"guided_grammar": 'root ::= "a" ('}, "guided_grammar"),
            ({"guided_json": {"if": {}}}, "guided_json"),
        ):
            error = await server.refusal(path, body | fields | {"stream": stream})
            assert error["param"] == field
            assert error["message"].startswith(field)
    assert (await server.post("/v1/completions", prompt="a"))["choices"]


@pytest.mark.parametrize(
    ("cause", "status", "field"), [("", 400, "guided_regex"), (TOO_MANY, 503, None)], ids=["time", "number"]
)
async def test_limits_of_compilation(
    server: InLoop, monkeypatch: pytest.MonkeyPatch, cause: str, status: int, field: str | None
) -> None:
    async def check(grammar: Grammar) -> str:
        assert grammar == Grammar("regex", "a+")
        if not cause:
            await asyncio.Event().wait()
        return cause

    monkeypatch.setattr(structured_outputs, "MAX_COMPILE_S", 0.01)
    monkeypatch.setattr(server.client, "check_grammar", check)
    error = await server.refusal("/v1/completions", {"prompt": "a", "guided_regex": "a+"}, status)
    assert error["param"] == field
    assert error["message"] == (cause or "guided_regex: the grammar was not compiled within 0.01 s")


async def test_metrics_count_grammars(server: InLoop) -> None:
    anything = "(?s:.)*"  # the worker samples without masks
    for pattern, status in ((anything, 200), (anything, 200), ("a(", 400)):
        answer = await server.http.post("/v1/completions", json={"prompt": "a", "guided_regex": pattern})
        assert answer.status_code == status, answer.text
    text = (await server.http.get("/metrics")).text
    found = dict(re.findall(r"^redline:grammar_(\w+)\{model_name=\S+\} (\S+)$", text, re.MULTILINE))
    assert (found["requests_total"], found["cache_hits_total"], found["compile_seconds_count"]) == ("3.0", "1.0", "2.0")


def test_errors_name_the_field() -> None:
    with pytest.raises(RequestError, match="guided_choice"):
        wanted(guided_choice=[""])
