"""Parts of a message's content: texts, and the images, sounds and videos that stand next to them.

Media become parts that templates know, {"type": "image"}; where their data is goes into a `MediaPart`, in the order of
the conversation.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from engine.errors import RequestError
from engine.media.limits import LIMIT_FLAG
from engine.multimodal.expansion import NAMES, count_of
from engine.multimodal.types import MediaKind

Part = dict[str, Any]

# Types of parts: the kind, and the fields that may hold the data. OpenAI's, vLLM's, and those of templates.
MEDIA_PARTS: dict[str, tuple[MediaKind, tuple[str, ...]]] = {
    "image_url": ("image", ("image_url",)),
    "input_image": ("image", ("image_url",)),
    "image_pil": ("image", ("image_pil",)),
    "image": ("image", ("image", "url", "image_url")),
    "input_audio": ("audio", ("input_audio",)),
    "audio_url": ("audio", ("audio_url",)),
    "audio": ("audio", ("audio", "url", "audio_url")),
    "video_url": ("video", ("video_url",)),
    "video": ("video", ("video", "url", "video_url")),
}
TEXT_PARTS = ("text", "input_text", "output_text")
DETAILS = ("auto", "low", "high", "original")  # accepted without effect: the model's processor chooses the size
DEFAULT_PER_PROMPT = 999  # of each kind, as in vLLM


class MediaPart(NamedTuple):
    """An input of a conversation.

    Args:
        kind: of input.
        field: of the request, for messages.
        data: a URL; base64 text; or, in Python, bytes of a file or an object (see `engine.media.objects`).
        is_base64: whether `data` is base64 text.
    """

    kind: MediaKind
    field: str
    data: Any
    is_base64: bool = False


def read_parts(content: Sequence[Any], field: str, takes: Collection[str], media: list[MediaPart]) -> list[Part]:
    """The parts of a content in the form that templates expect.

    Args:
        content: the parts.
        field: of the content in the request, for messages.
        takes: kinds of inputs that the model takes.
        media: the inputs are appended to it.

    Raises:
        RequestError: a part is not valid, or of a kind that the model doesn't take.
    """
    return [_read(part, field, f"{field}[{at}]", takes, media) for at, part in enumerate(content)]


def _read(part: Any, field: str, own_field: str, takes: Collection[str], media: list[MediaPart]) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "refusal" and isinstance(part.get("refusal"), str):
        return {"type": "text", "text": part["refusal"]}
    if kind in MEDIA_PARTS:
        medium, _ = MEDIA_PARTS[kind]
        if medium not in takes:
            others = " and ".join(NAMES[one][1] for one in takes)
            instead = f", only texts and {others}" if others else ", only texts"
            raise RequestError(f"{own_field}: this model takes no {NAMES[medium][1]}{instead}", own_field)
        media.append(_media(part, own_field))
        return {"type": medium}
    if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
        known = "text parts" if not takes else f"text parts and {' and '.join(NAMES[one][1] for one in takes)}"
        raise RequestError(f"{field} has a part of type {kind!r}: only {known} are supported", field)
    return part | {"type": "text"}


def _media(part: Part, field: str) -> MediaPart:
    """An input with the place of its data."""
    kind, names = MEDIA_PARTS[part["type"]]
    name = next((name for name in names if part.get(name) is not None), None)
    if name is None:
        if part.get("uuid") is not None:
            raise RequestError(
                f"{field}: a uuid alone names no {NAMES[kind][0]} here, since inputs are recognized by their content: "
                f"send {names[0]} too",
                field,
            )
        raise RequestError(f"{field}.{names[0]} is missing", f"{field}.{names[0]}")
    value, place = part[name], f"{field}.{name}"
    if part["type"] == "input_audio":
        return _input_audio(value, place)
    detail = part.get("detail")
    if isinstance(value, dict):
        detail = value.get("detail", detail)
        value, place = value.get("url"), f"{place}.url"
    if detail not in (None, *DETAILS):
        raise RequestError(f"{field}.detail must be one of {', '.join(DETAILS)}, not {detail!r}", field)
    if value is None or isinstance(value, bool | int | float | list):
        raise RequestError(f"{place} must be a URL", place)
    return MediaPart(kind, place, value)


def _input_audio(value: Any, place: str) -> MediaPart:
    if not isinstance(value, dict) or not isinstance(value.get("data"), str):
        raise RequestError(f'{place} must be {{"data": …, "format": "wav"}}, with base64 data', place)
    form = value.get("format")
    if form is not None and not isinstance(form, str):  # the format is read from the data
        raise RequestError(f"{place}.format must be a string", f"{place}.format")
    return MediaPart("audio", f"{place}.data", value["data"], is_base64=True)


def check_numbers(media: Sequence[MediaPart], per_prompt: Mapping[str, int]) -> None:
    """Raise RequestError for more inputs of a kind than a prompt may have (`--limit-mm-per-prompt`)."""
    counts: Counter[str] = Counter()
    for part in media:
        counts[part.kind] += 1
        most = per_prompt.get(part.kind, DEFAULT_PER_PROMPT)
        if counts[part.kind] > most:
            total = sum(one.kind == part.kind for one in media)
            raise RequestError(
                f"{part.field}: the prompt has {count_of(total, part.kind)}, but at most {most} may be in one "
                f"({LIMIT_FLAG} {part.kind}={most})",
                part.field,
            )


def check_alone(media: Sequence[MediaPart], alone: str) -> None:
    """Raise RequestError for inputs of several kinds, one of which must not be with others (`MMSpec.alone`)."""
    kinds = {part.kind for part in media}
    if alone in kinds and len(kinds) > 1:
        part = next(one for one in media if one.kind == alone)
        others = " and ".join(NAMES[kind][1] for kind in sorted(kinds - {alone}))
        raise RequestError(
            f"{part.field}: this model takes no {NAMES[part.kind][0]} together with {others}", part.field
        )


def refuse_placeholders(messages: Iterable[Any], texts: Mapping[str, str]) -> None:
    """Raise RequestError for a text that contains the text of a placeholder: it would stand for an input.

    Args:
        messages: of a conversation, with all texts that a template may write.
        texts: by kind, the text of the placeholder token.
    """
    for number, message in enumerate(messages):
        _refuse(message, texts, f"messages[{number}]")


def _refuse(value: Any, texts: Mapping[str, str], field: str) -> None:
    if isinstance(value, str):
        for kind, text in texts.items():
            if text in value:
                one = NAMES[kind][0]
                raise RequestError(
                    f"{field} contains {text!r}, which stands for {'an' if one[0] in 'aeiou' else 'a'} {one} in this "
                    "model's prompts and can't be part of a text: send the input as a part, and leave this text out",
                    field,
                )
    elif isinstance(value, dict):
        for name, one_value in value.items():
            _refuse(one_value, texts, f"{field}.{name}")
    elif isinstance(value, list | tuple):
        for at, one_value in enumerate(value):
            _refuse(one_value, texts, f"{field}[{at}]")
