"""Outputs that a grammar allows: random walks over the tokens of its masks."""

import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.core.grammar_compiler import GrammarCompiler
from engine.grammar import Grammar

# Tokens of several bytes, as tokenizers have them for JSON, beside one token for each byte.
LONGER = [
    '{"', '":', '",', '"}', '": "', '", "', "]}", "}}", "},", "[]", "{}", "[{", "null", "true", "false", "00", "12",
    ".5", "e-", "\\u", "\\n", '\\"', "\\u00", "the", "ab", "foo", "bar", "  ", "\n ", "é", "日本", "😀", "http", "://",
    "@", "-0",
]  # fmt: skip
CLOSERS = '"}]'


class Bytes:
    """Implements `engine.core.grammar_compiler.Vocabulary`."""

    special_ids = (256 + len(LONGER),)

    def __init__(self) -> None:
        self.pieces = [bytes([one]) for one in range(256)] + [one.encode() for one in LONGER] + [b"<|end|>"]
        self._ids = {piece: token for token, piece in enumerate(self.pieces[:-1])}

    def encode(self, text: str) -> list[int]:
        data, at, found = text.encode(), 0, []
        while at < len(data):
            length = next(n for n in range(12, 0, -1) if data[at : at + n] in self._ids)
            found.append(self._ids[data[at : at + length]])
            at += length
        return found


VOCABULARY = Bytes()


def group_of(piece: bytes) -> str:
    """Groups are drawn first, so that the many letters do not hide the few tokens that change the structure."""
    if len(piece) > 1:
        return "several bytes"
    text = piece.decode("latin-1")
    for name, members in (
        ("closing", CLOSERS), ("structure", "{[:,"), ("sign", "+-.eE"), ("space", " \n\t\r"), ("escape", "\\/u"),
        ("common", "abfo"),
    ):  # fmt: skip
        if text in members:
            return name
    return "digit" if text.isdigit() else "letter" if text.isascii() and text.isalpha() else "other"


GROUPS = [group_of(piece) for piece in VOCABULARY.pieces]


class Walks:
    """Draws outputs of grammars. `limit`: tokens after which an output is ended as soon as it can be."""

    def __init__(self, limit: int = 30, most: int = 1000):
        self._compiler = GrammarCompiler(lambda: VOCABULARY)
        self._limit = limit
        self._most = most

    def start(self, schema: dict[str, Any]) -> Callable[[random.Random], bytes]:
        """A function that draws an output of a schema. Raises RequestError if the schema can't be used."""
        compiled = self._compiler.compile(Grammar("json_schema", json.dumps(schema)))
        return lambda luck: self._walk(compiled.deep_copy(), luck)

    def allows(self, grammar: Grammar, text: str) -> bool:
        """Whether an output can begin with a text."""
        tokens = list(text.encode())
        return bool(self._compiler.compile(grammar).try_consume_tokens(tokens) == len(tokens))

    def _walk(self, matcher: Any, luck: random.Random) -> bytes:
        found = b""
        end = len(VOCABULARY.pieces)
        for step in range(self._most):
            row = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            bits = np.unpackbits(row, bitorder="little")
            assert not matcher.is_error(), matcher.get_error()
            allowed = np.flatnonzero(bits[:end]).tolist()
            may_end = bool(bits[end])
            if not allowed or (may_end and (step >= self._limit or luck.random() < 0.3)):
                assert may_end, found
                return found
            token = _draw(_nearer_to_the_end(allowed, found) if step >= self._limit else allowed, luck)
            assert matcher.consume_token(token), (found, VOCABULARY.pieces[token])
            found += VOCABULARY.pieces[token]
            if matcher.is_stopped():
                return found
        raise AssertionError(f"an output does not end: {found!r}")


def _draw(tokens: list[int], luck: random.Random) -> int:
    group = luck.choice(sorted({GROUPS[token] for token in tokens}))
    return luck.choice([token for token in tokens if GROUPS[token] == group])


def _nearer_to_the_end(allowed: list[int], text: bytes) -> list[int]:
    in_string = len(re.findall(rb'(?<!\\)(?:\\\\)*"', text)) % 2
    for closing in b'"' if in_string else b'}]"':
        if closing in allowed:
            return [closing]
    return [token for token in allowed if GROUPS[token] != "space"] or allowed
