"""Reads a JSON object that arrives in pieces (RFC 8259): where it ends, whether it is valid so far, its members.

Everything is found in one pass, so a long object costs no more in many pieces than in one.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

SPACES = re.compile(r"[ \t\n\r]*")
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # characters of a string that stand for themselves
HEX = re.compile(r"[0-9A-Fa-f]*")
WORD = re.compile(r"[-+.0-9A-Za-z]*")  # characters of numbers and literals
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
LITERALS = ("true", "false", "null")
ESCAPES = '"\\/bfnrtu'
CLOSING = {"{": "}", "[": "]"}


class Member(NamedTuple):
    """A member of the object; places in the text, the key with its quotes."""

    key_begin: int
    key_end: int
    begin: int
    end: int  # -1 until the value is complete


class JsonReader:
    """Reads one object. The text may grow between calls of `read`; what has been read must not change."""

    __slots__ = ("_hex_left", "_key", "_resume", "_stack", "_state", "_token", "at", "broken", "done", "members")

    def __init__(self, begin: int):
        """`begin` is the place of the object's opening brace."""
        self.at = begin  # all before it has been read
        self.done = False
        self.broken = False
        self.members: list[Member] = []
        self._stack: list[str] = []  # brackets that are open
        self._token = begin  # where the string, number or literal begins that is being read
        self._key = (begin, begin)
        self._state: Callable[[str], None] = self._value
        self._resume: Callable[[str], None] = self._state  # after an escape
        self._hex_left = 0  # digits of an escape

    def read(self, text: str) -> bool:
        """Read on; returns whether the object has ended, or can't be valid."""
        while self.at < len(text) and not (self.done or self.broken):
            self._state(text)
        return self.done or self.broken

    @property
    def _top(self) -> bool:
        """Whether a member of the object itself is being read."""
        return len(self._stack) == 1

    def _skip_spaces(self, text: str) -> str:
        """Skip spaces; returns the next character, "" at the end of the text."""
        match = SPACES.match(text, self.at)
        assert match is not None
        self.at = match.end()
        return text[self.at : self.at + 1]

    def _value(self, text: str) -> None:
        character = self._skip_spaces(text)
        if not character:
            return
        if self._top:
            self.members.append(Member(*self._key, self.at, -1))
        self._token = self.at
        if not self._stack and character != "{":
            self.broken = True
        elif character in CLOSING:
            self._stack.append(character)
            self.at += 1
            self._state = self._first_key if character == "{" else self._first_value
        elif character == '"':
            self.at += 1
            self._state = self._string
        else:
            self._state = self._word

    def _first_value(self, text: str) -> None:
        if self._skip_spaces(text) == "]":
            self._close("]")
        elif self.at < len(text):
            self._state = self._value

    def _first_key(self, text: str) -> None:
        if self._skip_spaces(text) == "}":
            self._close("}")
        elif self.at < len(text):
            self._state = self._next_key

    def _next_key(self, text: str) -> None:
        character = self._skip_spaces(text)
        if character == '"':
            self._token = self.at
            self.at += 1
            self._state = self._key_string
        elif character:
            self.broken = True

    def _key_string(self, text: str) -> None:
        if self._read_string(text):
            self._key = (self._token, self.at)
            self._state = self._colon

    def _colon(self, text: str) -> None:
        character = self._skip_spaces(text)
        if character == ":":
            self.at += 1
            self._state = self._value
        elif character:
            self.broken = True

    def _string(self, text: str) -> None:
        if self._read_string(text):
            self._end_value()

    def _read_string(self, text: str) -> bool:
        """Read up to the closing quote; returns whether it was found."""
        match = PLAIN.match(text, self.at)
        assert match is not None
        self.at = match.end()
        character = text[self.at : self.at + 1]
        if character == '"':
            self.at += 1
            return True
        if character == "\\":
            self.at += 1
            self._resume, self._state = self._state, self._escape
        elif character:
            self.broken = True  # a control character
        return False

    def _escape(self, text: str) -> None:
        letter = text[self.at]
        self.at += 1
        self._hex_left = 4 if letter == "u" else 0
        self._state = self._hex if letter == "u" else self._resume
        self.broken = letter not in ESCAPES

    def _hex(self, text: str) -> None:
        match = HEX.match(text, self.at, self.at + self._hex_left)
        assert match is not None
        self._hex_left -= match.end() - self.at
        self.at = match.end()
        if not self._hex_left:
            self._state = self._resume
        elif self.at < len(text):
            self.broken = True

    def _word(self, text: str) -> None:
        match = WORD.match(text, self.at)
        assert match is not None
        self.at = match.end()
        if self.at < len(text):
            word = text[self._token : self.at]
            if word in LITERALS or NUMBER.fullmatch(word):
                self._end_value()
            else:
                self.broken = True

    def _end_value(self) -> None:
        if self._top:
            self.members[-1] = self.members[-1]._replace(end=self.at)
        self._state = self._comma

    def _comma(self, text: str) -> None:
        character = self._skip_spaces(text)
        if character == ",":
            self.at += 1
            self._state = self._next_key if self._stack[-1] == "{" else self._value
        elif character:
            self._close(character)

    def _close(self, character: str) -> None:
        if character != CLOSING[self._stack[-1]]:
            self.broken = True
            return
        self.at += 1
        self._stack.pop()
        if self._stack:
            self._end_value()
        else:
            self.done = True
