"""Templates of families whose published ones don't write their inputs, or not as their processors do."""

import pytest

from engine.errors import RequestError
from engine.frontend.chat_template import ChatTemplate
from engine.frontend.default_templates import MOLMO, default_template, with_inputs

PLACEHOLDERS = {"image": "<|image|>"}
TOKENS = {"eos_token": "<|endoftext|>"}
PUBLISHED = (
    "{% for message in messages -%}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{%- if not loop.last -%}{{ ' ' }}{%- endif %}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' Assistant:' }}{%- endif -%}"
)
ASK = {"role": "user", "content": "What is it?"}
ASK_OF_IMAGES = {
    "role": "user",
    "content": [
        {"type": "text", "text": "Which is"},
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": " a cat?"},
    ],
}
ANSWER = {"role": "assistant", "content": "The first."}


def render(template: str, *messages: dict[str, object], **options: object) -> str:
    found: str = ChatTemplate(template, TOKENS).render(list(messages), placeholders=PLACEHOLDERS, **options)  # type: ignore[arg-type]
    return found


def test_molmo_has_its_images_first() -> None:
    """As its processor: the token that ends texts, the images, " User: … Assistant:"."""
    assert with_inputs("molmo", {"default": PUBLISHED}) == {"default": MOLMO}
    assert default_template("molmo", stand_in=False) == MOLMO
    assert render(MOLMO, ASK) == "<|endoftext|> User: What is it? Assistant:"
    found = render(MOLMO, ASK_OF_IMAGES)
    assert found == "<|endoftext|><|image|><|image|> User: Which is a cat? Assistant:"
    whole = render(MOLMO, ASK_OF_IMAGES, ANSWER, ASK)
    assert whole == (
        "<|endoftext|><|image|><|image|> User: Which is a cat? Assistant: The first. User: What is it? Assistant:"
    )
    assert render(MOLMO, ASK, ANSWER, add_generation_prompt=False).endswith(" Assistant: The first.")


def test_texts_of_molmo_are_those_of_its_published_template() -> None:
    published = "<|endoftext|> " + ChatTemplate(PUBLISHED, {}).render([ASK, ANSWER, ASK])
    assert render(MOLMO, ASK, ANSWER, ASK) == published


def test_roles_of_molmo_alternate() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render(MOLMO, {"role": "system", "content": "Be brief."}, ASK)


def test_molmo_2_begins_with_the_token_that_ends_texts() -> None:
    published = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}\n"
    fitted = with_inputs("molmo2", {"default": published})["default"]
    assert render(fitted, ASK) == "<|endoftext|><|im_start|>What is it?"
    already = with_inputs("molmo2", {"default": "{{ eos_token }}" + published})["default"]
    assert render(already, ASK) == "<|endoftext|><|im_start|>What is it?"


def test_other_families_keep_their_templates() -> None:
    assert with_inputs("llava", {"default": PUBLISHED}) == {"default": PUBLISHED}
    assert with_inputs(None, {}) == {}
