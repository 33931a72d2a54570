"""Parts of contents: the spellings of clients, what is refused, and how templates get them."""

from typing import Any

import pytest

from engine.errors import RequestError
from engine.frontend.chat_template import ChatTemplate
from engine.frontend.content_parts import MediaPart, check_alone, check_numbers, refuse_placeholders
from engine.frontend.conversation import shape_conversation
from engine.frontend.default_templates import LLAVA, PLAIN, default_template

ALL = ("image", "audio", "video")
TEXTS = {"image": "<image>"}
ASKING = {"type": "text", "text": "What?"}


def read(*parts: Any, takes: tuple[str, ...] = ALL) -> tuple[list[Any], list[MediaPart]]:
    media: list[MediaPart] = []
    [message] = shape_conversation([{"role": "user", "content": list(parts)}], takes, media)
    return message["content"], media


def refusal(part: Any, takes: tuple[str, ...] = ALL) -> str:
    with pytest.raises(RequestError) as caught:
        read(ASKING, part, takes=takes)
    assert (caught.value.field or "").startswith("messages[0].content")
    return str(caught.value)


@pytest.mark.parametrize(
    ("part", "kind", "field"),
    [
        ({"type": "image_url", "image_url": {"url": "X", "detail": "low"}}, "image", "image_url.url"),
        ({"type": "image_url", "image_url": "X"}, "image", "image_url"),
        ({"type": "image_url", "image_url": {"url": "X"}, "uuid": "u"}, "image", "image_url.url"),
        ({"type": "input_image", "image_url": "X", "detail": "auto"}, "image", "image_url"),
        ({"type": "image", "image": "X"}, "image", "image"),
        ({"type": "image", "url": "X"}, "image", "url"),
        ({"type": "audio_url", "audio_url": {"url": "X"}}, "audio", "audio_url.url"),
        ({"type": "video_url", "video_url": {"url": "X"}}, "video", "video_url.url"),
    ],
)
def test_spellings_of_clients(part: Any, kind: str, field: str) -> None:
    content, media = read(ASKING, part)
    assert content == [ASKING, {"type": kind}]
    assert media == [(kind, f"messages[0].content[1].{field}", "X", False)]


def test_audio_as_openai_sends_it() -> None:
    content, media = read({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}})
    assert content == [{"type": "audio"}]
    assert media == [("audio", "messages[0].content[0].input_audio.data", "AAAA", True)]


def test_inputs_keep_their_order() -> None:
    _, media = read(*({"type": "image_url", "image_url": name} for name in "abc"))
    assert [part.data for part in media] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("part", "takes", "reason"),
    [
        ({"type": "image_url", "image_url": "X"}, (), "this model takes no images, only texts"),
        ({"type": "image_url"}, (), "this model takes no images"),
        ({"type": "input_audio", "input_audio": {}}, ("image",), "takes no sounds, only texts and images"),
        ({"type": "video_url", "video_url": "X"}, ("image", "audio"), "no videos, only texts and images and sounds"),
        ({"type": "image_url"}, ALL, "messages[0].content[1].image_url is missing"),
        ({"type": "image"}, ALL, "content[1].image is missing"),
        ({"type": "image_url", "uuid": "u"}, ALL, "a uuid alone names no image"),
        ({"type": "image_url", "image_url": {}}, ALL, "image_url.url must be a URL"),
        ({"type": "image_url", "image_url": 5}, ALL, "image_url must be a URL"),
        ({"type": "image_url", "image_url": {"url": "X", "detail": "tiny"}}, ALL, "detail must be one of"),
        ({"type": "input_audio", "input_audio": "X"}, ALL, "with base64 data"),
        ({"type": "input_audio", "input_audio": {"data": "A", "format": 3}}, ALL, "format must be a string"),
        ({"type": "file", "file": {}}, ALL, "part of type 'file': only text parts and images and sounds and videos"),
    ],
)
def test_parts_that_are_refused(part: Any, takes: tuple[str, ...], reason: str) -> None:
    assert reason in refusal(part, takes)


def test_numbers_per_prompt() -> None:
    parts = [MediaPart("image", f"messages[0].content[{at}]", "X") for at in range(1000)]
    check_numbers(parts[:999], {})
    check_numbers(parts[:4], {"image": 4, "video": 0})
    for given, limits, reason in (
        (parts, {}, r"content\[999\]: the prompt has 1000 images, but at most 999"),
        (parts[:5], {"image": 4}, r"has 5 images, but at most 4 may be in one \(--limit-mm-per-prompt image=4\)"),
        (parts[:1], {"image": 0}, "has 1 image, but at most 0"),
    ):
        with pytest.raises(RequestError, match=reason):
            check_numbers(given, limits)


def test_a_kind_that_is_not_taken_with_others() -> None:
    parts = [MediaPart("image", "messages[0].content[0]", "X"), MediaPart("video", "messages[0].content[1]", "X")]
    check_alone(parts, "")
    check_alone(parts[:1], "video")
    check_alone(parts[1:], "video")
    with pytest.raises(RequestError, match=r"content\[1\]: this model takes no video together with images"):
        check_alone(parts, "video")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "see <image> here"},
        {"role": "user", "content": [{"type": "text", "text": "<image>"}]},
        {"role": "user", "content": "x", "name": "<image>"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"a": ["<image>"]}}}]},
    ],
)
def test_texts_never_become_placeholders(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="'<image>', which stands for an image"):
        refuse_placeholders([{"role": "user", "content": "<img> is fine"}, message], TEXTS)


def test_templates_that_write_images_place_them() -> None:
    source = (
        "{% for m in messages %}{% for p in m.content %}"
        "{% if p.type == 'image' %}[<image>]{% else %}{{ p.text }}{% endif %}{% endfor %};{% endfor %}"
    )
    content = [ASKING, {"type": "image"}, {"type": "text", "text": "!"}]
    written = ChatTemplate(source, {}).render([{"role": "user", "content": content}], placeholders=TEXTS)
    assert written == "What?[<image>]!;"


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }};{% endfor %}",
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}",
    ],
)
def test_other_templates_get_placeholders_before_the_text(source: str) -> None:
    template = ChatTemplate(source, {})
    content = [ASKING, {"type": "image"}, {"type": "image"}]
    assert template.render([{"role": "user", "content": content}], placeholders=TEXTS) == "<image>\n<image>\nWhat?;"
    assert template.render([{"role": "user", "content": [{"type": "image"}]}], placeholders=TEXTS) == "<image>;"


def test_llava_without_a_template_has_vicunas_format() -> None:
    assert default_template("llava", stand_in=False) == LLAVA
    assert default_template("llama", stand_in=True) == PLAIN
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [ASKING, {"type": "image"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Why?"},
    ]
    written = ChatTemplate(LLAVA, {"eos_token": "</s>"}).render(messages, placeholders=TEXTS)
    assert written == "Be brief. USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
