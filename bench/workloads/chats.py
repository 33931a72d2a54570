"""Chat messages of data sets: checks them, and converts the forms of their content to the API's."""

from typing import Any


def chat_fault(messages: Any) -> str:
    """Why this is not a list of chat messages; "" if it is one."""
    if not isinstance(messages, list) or not messages:
        return "messages must be a non-empty list of chat messages"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {number} must be an object with a role"
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        if content is not None and not all(map(_is_part, parts)):
            return f"the content of message {number} must be a text, or a list of texts or parts with a type"
    return ""


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages in the API's form: texts in a list become content parts."""
    return [
        message | {"content": [_part(part) for part in _listed(message["content"])]}
        if isinstance(message.get("content"), list | dict)
        else message
        for message in messages
    ]


def text_of(content: Any) -> str | None:
    """The text of a content in any of these forms, parts separated by newlines; None if it has no text."""
    if isinstance(content, str):
        return content
    parts = [_part(part) for part in _listed(content) if _is_part(part)]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts) if texts else None


def _listed(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def _is_part(part: Any) -> bool:
    if isinstance(part, str):
        return True
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return False
    return part["type"] != "text" or isinstance(part.get("text"), str)


def _part(part: Any) -> dict[str, Any]:
    return {"type": "text", "text": part} if isinstance(part, str) else part
