"""Chat templates: the Jinja program of a model that writes a conversation as one prompt, run in a sandbox."""

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import RequestError


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; when serving it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: dict[str, str]):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True, **extra: Any) -> str:
        """Write the conversation as a prompt; RequestError if the template doesn't take it."""
        try:
            return self._template.render(
                **{**self._special_tokens, **extra}, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except RequestError:
            raise
        except Exception as error:  # a template is a program of the model's: it may fail in any way
            raise RequestError(f"the model's chat template fails on these messages: {error}", "messages") from error


def refuse(message: str) -> None:
    raise RequestError(f"the model's chat template refuses these messages: {message}", "messages")


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Unlike jinja2's own filter this one doesn't escape for HTML: the text goes to a model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def read_template(folder: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """Find the template's source among the places where model folders keep it."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    readers: list[Callable[[], Any]] = [lambda: tokenizer_config.get("chat_template")]
    processor = folder / "chat_template.json"
    if processor.is_file():
        readers.append(lambda: json.loads(processor.read_text(encoding="utf-8")).get("chat_template"))
    for read in readers:
        found = read()
        if isinstance(found, list):  # several by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if isinstance(found, str):
            return found
    return None
