"""JSON schemas of Anthropic's API."""

from engine.api.openapi_responses import BOOLEAN, COUNT, STRING, Schema, listed, nullable, record, ref

OBJECT: Schema = {"type": "object"}


def _typed(kind: str, required: dict[str, Schema], optional: dict[str, Schema] | None = None) -> Schema:
    return record({"type": {"const": kind}} | required, {"cache_control": nullable(OBJECT)} | (optional or {}))


_TEXT = _typed("text", {"text": STRING})
_CALL: dict[str, Schema] = {"id": STRING, "name": STRING, "input": OBJECT}
_USAGE = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens")

MESSAGES_API: dict[str, Schema] = {
    "ImageBlock": _typed(
        "image",
        {
            "source": {
                "anyOf": [
                    record({"type": {"const": "base64"}, "media_type": STRING, "data": STRING}),
                    record({"type": {"const": "url"}, "url": STRING}),
                ]
            }
        },
    ),
    "InputBlock": {
        "anyOf": [
            _TEXT,
            ref("ImageBlock"),
            _typed("thinking", {"thinking": STRING}, {"signature": STRING}),
            _typed("tool_use", _CALL),
            _typed(
                "tool_result",
                {"tool_use_id": STRING},
                {
                    "content": {"anyOf": [STRING, listed({"anyOf": [_TEXT, ref("ImageBlock")]})]},
                    "is_error": BOOLEAN,
                },
            ),
        ]
    },
    "InputMessage": record(
        {"role": {"enum": ["user", "assistant"]}, "content": {"anyOf": [STRING, listed(ref("InputBlock"))]}}
    ),
    "InputTool": record(
        {"name": STRING, "input_schema": OBJECT},
        {"type": {"const": "custom"}, "description": STRING, "strict": BOOLEAN, "cache_control": nullable(OBJECT)},
    ),
    "MessagesMessage": record(
        {
            "id": STRING,
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": STRING,
            "content": listed(
                {
                    "anyOf": [
                        record({"type": {"const": "text"}, "text": STRING}),
                        record({"type": {"const": "thinking"}, "thinking": STRING, "signature": STRING}),
                        record({"type": {"const": "tool_use"}} | _CALL),
                    ]
                }
            ),
            "stop_reason": {
                "enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
            },
            "stop_sequence": nullable(STRING),
            "usage": record(
                dict.fromkeys(_USAGE, COUNT), {"output_tokens_details": record({"thinking_tokens": COUNT})}
            ),
        }
    ),
    "MessagesTokens": record({"input_tokens": COUNT}),
    "MessagesError": record({"type": {"const": "error"}, "error": record({"type": STRING, "message": STRING})}),
}
