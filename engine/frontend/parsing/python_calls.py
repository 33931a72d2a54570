"""Calls written as a list of Python calls: `[f(a=1, b="x"), g()]`, as Llama 4 and others write them.

Nothing is run: the list is parsed, and its arguments must be literals.
"""

import ast
import json
import re
import warnings
from collections.abc import Collection
from typing import Any

from engine.frontend.parsing.call_ids import new_id
from engine.frontend.parsing.call_parser import StateReader
from engine.frontend.parsing.events import Arguments, CallBegin, CallEnd, Event

START, END = "<|python_start|>", "<|python_end|>"
SPACES = re.compile(r"\s*")
FIRST = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*)\s*\(")
FIRST_BEGUN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_.]*\s*)?")
LONGEST_FIRST = 256
OTHERS = re.compile(r"[^\[\](){}'\"#]*")  # characters outside of strings that mean nothing for where the list ends
IN_STRING = {quote: re.compile(rf"[^{quote}\\]*") for quote in "'\""}
CLOSING = {"[": "]", "(": ")", "{": "}"}
DEEPEST = 100
WORDS = {"true": True, "false": False, "null": None}
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError)


class PythonFormat:
    """A `CallFormat`."""

    markers = (START,)
    leading = ("[",)
    special = (START, END)

    def __init__(self, names: Collection[str]):
        """`names` of the tools: an answer that begins with a call of one of them needs no marker."""
        self._names = names

    def reader(self, marker: str, begin: int) -> "PythonCalls":
        return PythonCalls(begin, self._names if marker in self.leading else None)


class PythonCalls(StateReader):
    """Reads one list, and the closing marker."""

    def __init__(self, begin: int, names: Collection[str] | None):
        super().__init__(begin, self._read_start)
        self._begin = begin  # of the list
        self._names = names
        self._open: list[str] = []  # brackets
        self._quotes = ""  # those that end the string

    # Each state returns False if it needs more text.

    def _read_start(self, text: str, _events: list[Event]) -> bool:
        self._at = self._begin = _skip_spaces(text, self._at)
        if self._at == len(text):
            return False
        self.failed = text[self._at] != "["
        self._at += 1
        self._open.append("[")
        self._state = self._read_first
        return True

    def _read_first(self, text: str, _events: list[Event]) -> bool:
        """Read the name of the first function, so that another list does not have to be read to its end."""
        match = FIRST.match(text, self._at)
        if match is not None and match.end() - self._at <= LONGEST_FIRST:
            self.failed = self._names is not None and match[1] not in self._names
            self._at = match.end() - 1
            self._state = self._read_code
            return True
        begun = FIRST_BEGUN.match(text, self._at)
        assert begun is not None
        self.failed = begun.end() < len(text) or len(text) - self._at >= LONGEST_FIRST
        return False

    def _read_code(self, text: str, events: list[Event]) -> bool:
        match = OTHERS.match(text, self._at)
        assert match is not None
        self._at = match.end()
        character = text[self._at : self._at + 1]
        if character in CLOSING:
            self._open.append(character)
            self.failed = len(self._open) > DEEPEST
        elif character in IN_STRING:
            self._state = self._read_quotes
            return True
        elif not character:
            return False
        elif character == "#" or character != CLOSING[self._open.pop()]:
            self.failed = True
        self._at += 1
        if not self._open and not self.failed:
            self._finish_list(text, events)
        return True

    def _read_quotes(self, text: str, _events: list[Event]) -> bool:
        quote = text[self._at]
        found = text[self._at : self._at + 3]
        if len(found) < 3 and not found.strip(quote):
            return False
        self._quotes = quote * 3 if found == quote * 3 else quote
        empty = found[:2] == quote * 2 and found != quote * 3
        self._at += 2 if empty else len(self._quotes)
        self._state = self._read_code if empty else self._read_string
        return True

    def _read_string(self, text: str, _events: list[Event]) -> bool:
        match = IN_STRING[self._quotes[0]].match(text, self._at)
        assert match is not None
        self._at = match.end()
        rest = text[self._at : self._at + len(self._quotes)]
        if rest == self._quotes:
            self._at += len(rest)
            self._state = self._read_code
        elif rest[:1] == "\\" and self._at + 1 < len(text):
            self._at += 2
        elif rest[:1] != "\\" and len(rest) == len(self._quotes):
            self._at += 1  # one quote in a string that three of them end
        elif rest[:1] == "\\" or not rest.strip(self._quotes[0]):
            return False
        else:
            self._at += 1
        return True

    def _finish_list(self, text: str, events: list[Event]) -> None:
        try:
            calls = read_calls(text[self._begin : self._at])
        except UNREADABLE:
            self.failed = True
            return
        for name, arguments in calls:
            events += [CallBegin(new_id(), name), Arguments(arguments), CallEnd()]
        self._complete = True
        self.end = self._at
        self._state = self._read_close

    def _read_close(self, text: str, _events: list[Event]) -> bool:
        return self._read_closing(text, _skip_spaces(text, self._at), END)


def _skip_spaces(text: str, at: int) -> int:
    match = SPACES.match(text, at)
    assert match is not None
    return match.end()


def read_calls(source: str) -> list[tuple[str, str]]:
    """Names and arguments, as JSON, of a list of calls. Raises one of `UNREADABLE` if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes in strings
        found = ast.parse(source, mode="eval").body
    if not isinstance(found, ast.List) or not found.elts:
        raise ValueError("not a list of calls")
    return [_read_call(one) for one in found.elts]


def _read_call(node: ast.expr) -> tuple[str, str]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("not a call with named arguments")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError("an argument without a name")
        arguments[keyword.arg] = _value(keyword.value)
    written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    written.encode()  # fails for a lone surrogate
    return _name(node.func), written


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if not isinstance(node, ast.Name):
        raise ValueError("not a name")
    return node.id


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None):
        return node.value
    if isinstance(node, ast.Name) and node.id in WORDS:
        return WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand)
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(one) for one in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(one) for key, one in zip(node.keys, node.values, strict=True)}
    raise ValueError("not a literal")


def _number(node: ast.expr) -> int | float:
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool) or not isinstance(node.value, int | float):
        raise ValueError("not a number")
    return node.value


def _key(node: ast.expr | None) -> str:
    if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        raise ValueError("a key that is no string")
    return node.value
