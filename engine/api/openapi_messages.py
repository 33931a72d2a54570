"""JSON schemas of messages and of the parts of their contents; bodies are checked in `engine.frontend.conversation`."""

from typing import Any

from engine.api.openapi_responses import STRING, Schema, listed, nullable, record, ref


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
        {"content": {"anyOf": [STRING, listed(ref("ContentPart")), {"type": "null"}]}, "name": nullable(STRING)},
    ),
}


def with_messages(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas of bodies, whose `messages` refer to the schema of a message."""
    for schema in schemas.values():
        messages = schema.get("properties", {}).get("messages")
        for one in (messages, *(messages or {}).get("anyOf", ())):
            if one is not None and one.get("type") == "array":
                one["items"] = ref("Message")
    return schemas | MESSAGES
