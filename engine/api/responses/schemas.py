"""JSON schemas of /v1/responses."""

from engine.api.openapi_responses import BOOLEAN, COUNT, NULL, STRING, Schema, listed, nullable, record, ref

STATUS: Schema = {"enum": ["completed", "incomplete", "in_progress"]}
OBJECT: Schema = {"type": "object"}


def _typed(kind: str, required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return record({"type": {"const": kind}} | required, optional)


_CALL: dict[str, Schema] = {"call_id": STRING, "name": STRING, "arguments": STRING | {"description": "A JSON object."}}
_TEXT = {"text": STRING}
_OPTIONAL: dict[str, Schema] = {"id": STRING, "status": nullable(STRING)}

RESPONSES_API: dict[str, Schema] = {
    "InputPart": {
        "anyOf": [
            _typed("input_text", _TEXT),
            _typed("output_text", _TEXT),
            _typed("input_image", {"image_url": STRING}, {"detail": STRING}),
            _typed("refusal", {"refusal": STRING}),
        ]
    },
    "InputContent": {"anyOf": [STRING, listed(ref("InputPart"))]},
    "InputItem": {
        "anyOf": [
            record({"role": STRING, "content": ref("InputContent")}, {"type": {"const": "message"}} | _OPTIONAL),
            _typed("reasoning", {}, {"content": nullable(listed(OBJECT)), "summary": listed(OBJECT)} | _OPTIONAL),
            _typed("function_call", _CALL, _OPTIONAL),
            _typed("function_call_output", {"call_id": STRING, "output": ref("InputContent")}, _OPTIONAL),
        ]
    },
    "FunctionTool": _typed(
        "function",
        {"name": STRING},
        {"description": nullable(STRING), "parameters": nullable(OBJECT), "strict": nullable(BOOLEAN)},
    ),
    "OutputItem": {
        "anyOf": [
            _typed(
                "message",
                {"id": STRING, "status": STATUS, "role": {"const": "assistant"}}
                | {"content": listed(_typed("output_text", _TEXT | {"annotations": listed(OBJECT)}))},
            ),
            _typed(
                "reasoning",
                {"id": STRING, "status": STATUS, "summary": listed(OBJECT)}
                | {"content": listed(_typed("reasoning_text", _TEXT))},
            ),
            _typed("function_call", {"id": STRING, "status": STATUS} | _CALL),
        ]
    },
    "ResponseUsage": record(
        {
            "input_tokens": COUNT,
            "input_tokens_details": record({"cached_tokens": COUNT}),
            "output_tokens": COUNT,
            "output_tokens_details": record({"reasoning_tokens": COUNT}),
            "total_tokens": COUNT,
        }
    ),
    "Response": record(
        {
            "id": STRING,
            "object": {"const": "response"},
            "created_at": COUNT,
            "status": {"enum": ["completed", "incomplete", "failed", "in_progress"]},
            "model": STRING,
            "output": listed(ref("OutputItem")),
            "error": nullable(record({"code": STRING, "message": STRING})),
            "incomplete_details": nullable(record({"reason": {"const": "max_output_tokens"}})),
            "usage": nullable(ref("ResponseUsage")),
            "previous_response_id": nullable(STRING),
            "tools": listed(ref("FunctionTool")),
            "store": BOOLEAN,
        }
    ),
    "ResponseDeleted": record({"id": STRING, "object": {"const": "response"}, "deleted": BOOLEAN}),
    "InputItemList": record(
        {"object": {"const": "list"}, "data": listed(ref("InputItem")), "has_more": BOOLEAN}
        | {"first_id": {"anyOf": [STRING, NULL]}, "last_id": {"anyOf": [STRING, NULL]}}
    ),
}
