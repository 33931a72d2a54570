"""JSON schemas of messages and of the parts of their contents; bodies are checked in `engine.frontend.conversation`."""

from typing import Any

from engine.api.openapi_responses import BOOLEAN, STRING, Schema, listed, nullable, record, ref


def _part(kind: str, field: str, of: Schema) -> Schema:
    return record({"type": {"const": kind}, field: of})


def _url(what: str) -> Schema:
    described = STRING | {"description": f"URL of {what}: data:, https:, http:, or file: where the server allows it"}
    return {"anyOf": [described, record({"url": described}, {"detail": STRING})]}


MESSAGES: dict[str, Schema] = {
    "ContentPart": {
        "description": "A text, or an image, sound or video if the model takes them.",
        "anyOf": [
            _part("text", "text", STRING),
            _part("image_url", "image_url", _url("an image")),
            _part("input_image", "image_url", STRING),
            _part("input_audio", "input_audio", record({"data": STRING}, {"format": STRING})),
            _part("audio_url", "audio_url", _url("a sound")),
            _part("video_url", "video_url", _url("a video")),
            {"type": "object", "description": "Other names of these, and refusals.", "required": ["type"]},
        ],
    },
    "Message": record(
        {"role": STRING},
        {"content": {"anyOf": [STRING, listed(ref("ContentPart")), {"type": "null"}]}, "name": nullable(STRING)}
        | {"tool_calls": nullable(listed(ref("ToolCall"))), "tool_call_id": nullable(STRING)},
    ),
    "Tool": record(
        {
            "type": {"const": "function"},
            "function": record(
                {"name": STRING},
                {
                    "description": nullable(STRING),
                    "parameters": nullable({"type": "object"}),
                    "strict": nullable(BOOLEAN),
                },
            ),
        }
    ),
}


# Schemas of what the lists of a body have; those of other APIs by the name of their body.
ITEMS = {"messages": "Message", "input": "InputItem", "tools": "Tool"}
OTHER_ITEMS = {
    "ResponsesRequest": {"tools": "FunctionTool"},
    "MessagesRequest": {"messages": "InputMessage", "tools": "InputTool"},
    "CountTokensRequest": {"messages": "InputMessage", "tools": "InputTool"},
}


def with_messages(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas of bodies, whose `messages`, `input` and `tools` refer to the schemas of one of them."""
    for title, schema in schemas.items():
        for name, item in (ITEMS | OTHER_ITEMS.get(title, {})).items():
            given = schema.get("properties", {}).get(name)
            for one in (given, *(given or {}).get("anyOf", ())):
                if one is not None and one.get("type") == "array":
                    one["items"] = ref(item)
    return schemas | MESSAGES
