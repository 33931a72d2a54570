"""Chat templates: a model's Jinja program that writes a conversation as one prompt, run in a sandbox."""

import json
import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
import jinja2.utils
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import RequestError
from engine.frontend.content_forms import ContentForms, InputForms, tests_for_none
from engine.frontend.parsing.call_ids import with_mistral_ids
from engine.frontend.tool_messages import describe_tools, write_calls

log = logging.getLogger("redline.api")

# Fields of a message with the same meaning; templates read the first one.
REASONING = ("reasoning_content", "thinking", "reasoning")
END_MARK = "zqENDzq "  # marks the end of the message to continue
MISTRAL_ID_CHECK = "length != 9"  # in templates that reject other ids of calls


class GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's text for training; in serving, only its content counts."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template with its special tokens; safe to use from several threads."""

    def __init__(self, source: str, special_tokens: dict[str, str], named: Mapping[str, str] | None = None):
        """Compile a template.

        Args:
            source: of the default template.
            special_tokens: variables of templates besides the messages, e.g. `bos_token`.
            named: sources of the model's other templates by name; `tool_use` is for conversations with tools.

        Raises:
            jinja2.TemplateError: the source is not a valid template.
        """
        self.source = source + (named or {}).get("tool_use", "")
        self._environment = make_environment()
        self._special_tokens = special_tokens
        self._named = {name: _Compiled(self._environment, text, special_tokens) for name, text in (named or {}).items()}
        self._default = _Compiled(self._environment, source, special_tokens)

    def render(  # noqa: PLR0913  (all are keywords with defaults)
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        documents: list[dict[str, Any]] | None = None,
        template: str | None = None,
        reasoning_effort: str | None = None,
        extra: Mapping[str, Any] | None = None,
        placeholders: Mapping[str, str] | None = None,
        tools_as_text: bool = False,
    ) -> str:
        """Write a conversation as a prompt, as transformers' `apply_chat_template` does.

        Args:
            messages: with a text, a list of parts, or None as content. It is converted to a form that the template
                supports.
            add_generation_prompt: write the beginning of the assistant's message.
            continue_final_message: leave the last message open, so that the model continues it.
            tools: that the model may call, None for none.
            documents: that the response is to be grounded on, None for none.
            template: the name of one of the model's templates, or the source of another one.
            reasoning_effort: how long the model should think, if the template has a variable for it.
            extra: further variables of the template, including special tokens.
            placeholders: by kind of input (image, audio, video), the text that stands for one. A template that writes
                nothing for such a part gets this text before the text of the message.
            tools_as_text: describe the tools in the system message if the template takes none.

        Raises:
            RequestError: the template does not support this.
        """
        compiled = self._pick(template, tools)
        extra = dict(extra or {})
        if reasoning_effort is not None:
            if "reasoning_effort" in compiled.variables:
                extra["reasoning_effort"] = reasoning_effort
            elif reasoning_effort != "none":
                raise RequestError("the model's chat template takes no reasoning_effort", "reasoning_effort")
        if documents is not None and "documents" not in compiled.variables:
            raise RequestError("the model's chat template takes no documents", "documents")
        for name in extra.keys() - compiled.variables:
            _warn_of_unused(name)
        if tools and tools_as_text and not compiled.takes_tools:
            messages = describe_tools(messages, tools)
        if not compiled.takes_calls and (tools or any(message.get("tool_calls") for message in messages)):
            messages = write_calls(messages)
        variables = {**extra, "tools": tools, "documents": documents, "add_generation_prompt": add_generation_prompt}
        messages = [compiled.shape(message, placeholders or {}) for message in messages]
        if continue_final_message:
            if add_generation_prompt:
                raise RequestError(
                    "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
                )
            return _continued(messages, lambda: compiled.render(messages, variables))
        return compiled.render(messages, variables)

    @property
    def takes_tools(self) -> bool:
        """Whether the model's own template writes tools."""
        return self._named.get("tool_use", self._default).takes_tools

    @property
    def variables(self) -> frozenset[str]:
        """The variables of the model's own templates for conversations, with and without tools."""
        return frozenset(self._default.variables | self._named.get("tool_use", self._default).variables)

    def is_named(self, template: str) -> bool:
        """Whether the model has a template of this name."""
        return template in self._named

    def _pick(self, template: str | None, tools: list[Any] | None) -> "_Compiled":
        if template is None:
            return self._named.get("tool_use", self._default) if tools is not None else self._default
        if template in self._named:
            return self._named[template]
        try:
            return _Compiled(self._environment, template, self._special_tokens)
        except (jinja2.TemplateError, RecursionError) as error:
            raise RequestError(f"chat_template can't be read: {error}", "chat_template") from error


class _Compiled:
    """One template."""

    def __init__(self, environment: jinja2.Environment, source: str, special_tokens: dict[str, str]):
        parsed = environment.parse(source)
        self.variables = jinja2.meta.find_undeclared_variables(parsed)
        self.takes_tools = "tools" in self.variables
        self.takes_calls = "tool_calls" in source or self.takes_tools
        self._template = environment.from_string(source)
        self._special_tokens = special_tokens
        self._keeps_none = tests_for_none(parsed)
        self._short_ids = MISTRAL_ID_CHECK in source
        blank = {"tools": None, "documents": None, "add_generation_prompt": True}
        self._forms = ContentForms(lambda messages: self._write(messages, blank))
        self._inputs = InputForms(self._forms, lambda messages: self._write(messages, blank))

    def shape(self, message: dict[str, Any], placeholders: Mapping[str, str]) -> dict[str, Any]:
        """A message in the form that this template supports. Fields that are None are left out, as in transformers."""
        shaped = {name: value for name, value in message.items() if value is not None}
        if self._short_ids:
            shaped = with_mistral_ids(shaped)
        if "content" in shaped:
            if placeholders:
                shaped["content"] = self._inputs.convert(message["role"], shaped["content"], placeholders)
            shaped["content"] = self._forms.for_role(message["role"]).convert(shaped["content"])
        elif "content" in message and self._keeps_none:
            shaped["content"] = None
        reasoning = next((shaped[name] for name in REASONING if name in shaped), None)
        return shaped if reasoning is None else {"thinking": reasoning, **shaped, "reasoning_content": reasoning}

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        try:
            return self._write(messages, variables)
        except RequestError:
            raise
        except Exception as error:  # a template is a program and may fail in any way
            raise RequestError(f"the model's chat template fails on these messages: {error}", "messages") from error

    def _write(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        written = self._template.render({**self._special_tokens, **variables, "messages": messages})
        written.isascii() or written.encode()  # fails for a lone surrogate, which a template can write
        return written


def _continued(messages: list[dict[str, Any]], render: Callable[[], str]) -> str:
    """Render a conversation up to the end of its last message, whose end is marked in `messages`."""
    field = "continue_final_message"
    last = messages[-1]
    content = last.get("content")
    if isinstance(content, list):
        at = next((at for at in reversed(range(len(content))) if "text" in content[at]), None)
        if at is None:
            raise RequestError("continue_final_message: the last message has no text", field)
        text = content[at]["text"]
        content = [*content[:at], content[at] | {"text": text + END_MARK}, *content[at + 1 :]]
        messages[-1] = last | {"content": content}
    elif isinstance(content, str):
        text = content
        messages[-1] = last | {"content": text + END_MARK}
    else:
        raise RequestError("continue_final_message: the last message has no content to continue", field)
    written = render()
    mark = END_MARK.strip()
    end = written.rfind(mark)
    if end < 0 or text.strip() not in written:
        raise RequestError("continue_final_message: the model's chat template changes the last message", field)
    # If the template trims the text, the space at the end of the mark is gone.
    return written[:end] if written.startswith(END_MARK, end) else written[:end].rstrip()


_unused: set[str] = set()


def _warn_of_unused(name: str) -> None:
    if name not in _unused and len(_unused) < 200:  # names come from clients
        _unused.add(name)
        log.warning("chat_template_kwargs has %.100r, which the model's chat template does not use", name)


class PlainDict:
    """`dict` for templates, without the attributes of the class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class PlainNamespace(jinja2.utils.Namespace):
    """`namespace` for templates, without underscored names, which would give access to the interpreter."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args  # so that `namespace(self=…)` works
        values = dict(*given, **values)
        for name in values:
            PlainNamespace.check(name)
        jinja2.utils.Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace can't hold {name!r}")


def make_environment() -> jinja2.Environment:
    """The environment of templates; it offers what transformers offers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationBlock]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = reject
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["dict"] = PlainDict()
    environment.globals["namespace"] = PlainNamespace
    return environment


def reject(message: str) -> None:
    raise RequestError(f"the model's chat template rejects these messages: {message}", "messages")


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Unlike jinja2's own filter, this one does not escape HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def read_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Read a model's templates by name, `default` first, from all the files in which model folders keep them."""
    found: dict[str, str] = {}
    processor = folder / "chat_template.json"
    sources: list[Any] = [tokenizer_config.get("chat_template")]
    if processor.is_file():
        sources.append(json.loads(processor.read_text(encoding="utf-8")).get("chat_template"))
    for source in sources:
        if isinstance(source, list):  # several by name
            source = {entry["name"]: entry["template"] for entry in source}
        if not found and source:
            found = {"default": source} if isinstance(source, str) else dict(source)
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        found = {"default": own_file.read_text(encoding="utf-8")}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    return found
