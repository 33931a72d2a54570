"""The forms of a message's content that a chat template supports: a text, a list of parts, or both.

Templates of text models write `message.content` itself. Those of many multimodal models iterate over a list of parts
and write nothing for a text. The supported forms are found by rendering a conversation with a marked text in each form:
a form is supported if the marked text appears in the prompt, and not as part of a printed list.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes

MARK = "zqMARKEDzq"
QUOTES = "'\""
CALL = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {}}}

Message = dict[str, Any]
Render = Callable[[list[Message]], str]


class Forms(NamedTuple):
    """The forms of content that a template supports for one role."""

    text: bool
    parts: bool

    def convert(self, content: Any) -> Any:
        """Content in a form that the template supports."""
        if isinstance(content, str) and not self.text:
            return [{"type": "text", "text": content}]
        if isinstance(content, list) and not self.parts:
            return text_of(content)
        return content


BOTH = Forms(True, True)  # if neither form appears, content is passed on unchanged, as in transformers


def text_of(content: Any) -> str:
    """The text of a message's content; parts are joined by newlines."""
    if isinstance(content, list):
        return "\n".join(part.get("text", "") for part in content)
    return content or ""


class ContentForms:
    """The forms that one template supports, by role; found when a role first occurs."""

    def __init__(self, render: Render):
        """`render` renders a conversation, and may raise any exception."""
        self._render = render
        self._found: dict[str, Forms] = {}

    def for_role(self, role: str) -> Forms:
        """The forms that messages of a role may have."""
        found = self._found.get(role)
        if found is None:
            found = self._find(role)
            if found is None:
                found = BOTH if role == "user" else self.for_role("user")
            if len(self._found) < 64:  # roles come from clients
                self._found[role] = found
        return found

    def _find(self, role: str) -> Forms | None:
        text, parts = (self._shown(role, form) for form in (MARK, [{"type": "text", "text": MARK}]))
        takes_text = text is not None
        if parts is None:
            takes_parts = False
        elif text is not None and is_quoted(text):  # the template quotes contents itself
            takes_parts = parts == text
        else:
            takes_parts = not is_quoted(parts)
        return Forms(takes_text, takes_parts) if takes_text or takes_parts else None

    def _shown(self, role: str, content: Any) -> str | None:
        """The prompt of a conversation with this content in a message of the role; None if it does not appear."""
        for messages in self.conversations(role, content):
            try:
                written = self._render(messages)
            except Exception:
                continue
            if MARK in written:
                return written
        return None

    def conversations(self, role: str, content: Any) -> list[list[Message]]:
        """Conversations with this content in a message of the role; a template may reject some of them."""
        filler = "x" if role == "user" else self.for_role("user").convert("x")
        user = {"role": "user", "content": filler}
        message = {"role": role, "content": content}
        if role == "user":
            return [[message]]
        if role == "assistant":
            return [[user, message, user], [user, message]]
        if role == "tool":
            call = {"role": "assistant", "content": filler, "tool_calls": [CALL]}
            return [[user, call, message | {"tool_call_id": CALL["id"], "name": "f"}]]
        return [[message, user], [user, message]]


class InputForms:
    """Whether a template writes a placeholder for {"type": "image"} and the like; found when first needed."""

    def __init__(self, forms: ContentForms, render: Render):
        """`forms` are those that the template supports; `render` renders a conversation, and may raise anything."""
        self._render = render
        self._forms = forms
        self._found: dict[tuple[str, str, str], bool] = {}

    def convert(self, role: str, content: Any, placeholders: Mapping[str, str]) -> Any:
        """Content in which inputs that the template does not write are texts, before the first text.

        Args:
            role: of the message.
            content: a text or parts.
            placeholders: by kind, the text that stands for an input.
        """
        if not isinstance(content, list):
            return content
        missing = [kind for part in content if (kind := part.get("type")) in placeholders]
        missing = [kind for kind in missing if not self._writes(role, kind, placeholders[kind])]
        if not missing:
            return content
        lines = "\n".join(placeholders[kind] for kind in missing)
        kept = [part for part in content if part.get("type") not in missing]
        first = next((at for at, part in enumerate(kept) if part.get("type") == "text"), None)
        if first is None:
            return [{"type": "text", "text": lines}, *kept]
        kept[first] = kept[first] | {"text": f"{lines}\n{kept[first]['text']}"}
        return kept

    def _writes(self, role: str, kind: str, placeholder: str) -> bool:
        found = self._found.get((role, kind, placeholder))
        if found is None:
            content = [{"type": kind}, {"type": "text", "text": MARK}]
            # For a role whose contents must be texts, the part would be dropped.
            found = self._forms.for_role(role).parts and self._is_written(role, content, placeholder)
            if len(self._found) < 64:  # roles come from clients
                self._found[role, kind, placeholder] = found
        return found

    def _is_written(self, role: str, content: Any, placeholder: str) -> bool:
        for messages in self._forms.conversations(role, content):
            try:
                return placeholder in self._render(messages)
            except Exception:
                continue
        return False


def is_quoted(written: str) -> bool:
    """Whether the marked text is in quotes, as in a printed list."""
    before, after = written.split(MARK, 1)
    return before[-1:] in QUOTES and after[:1] in QUOTES and bool(before) and bool(after)


def tests_for_none(source: jinja2.nodes.Template) -> bool:
    """Whether a template tests if a content is none, as DeepSeek's do for messages with tool calls."""
    tests = [test.node for test in source.find_all(jinja2.nodes.Test) if test.name == "none"]
    for comparison in source.find_all(jinja2.nodes.Compare):
        sides = [comparison.expr, *(operand.expr for operand in comparison.ops)]
        if any(isinstance(side, jinja2.nodes.Const) and side.value is None for side in sides):
            tests += sides
    return any(_names_content(node) for node in tests)


def _names_content(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, jinja2.nodes.Getitem):
        return isinstance(node.arg, jinja2.nodes.Const) and node.arg.value == "content"
    return isinstance(node, jinja2.nodes.Name) and "content" in node.name
