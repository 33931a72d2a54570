"""Recorded texts: conversations in ShareGPT's format, and JSONL files of prompts or messages."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.workloads.base import Encode, RequestSpec
from bench.workloads.chats import chat_fault, chat_messages, text_of
from bench.workloads.datafile import DataRow, RowFaults
from bench.workloads.dataset import DEFAULT_OUTPUT, DEFAULT_ROWS, FLAG, find_data, read_json_rows, read_rows
from bench.workloads.fields import Length, boolean, draw, integer, length, length_field, length_text
from bench.workloads.sampling import passes, salt_ids, salt_text

_MAX_INPUT, _MAX_TOKENS, _MIN_TOKENS = 1024, 2048, 4  # for ShareGPT, as in vLLM's benchmark
_ENCODE_BATCH = 64
_CHARACTERS_PER_TOKEN = 2  # a lower bound for nearly all texts


class ShareGPT:
    """The first question of each conversation as the prompt, and the length of its first answer as the output length.

    Conversations with a prompt above `max_input`, more than `max_tokens` in all, or a part below 4 tokens are skipped.
    """

    def __init__(
        self,
        *,
        encode: Encode | None,
        dataset: str | None = None,
        max_input: int = _MAX_INPUT,
        max_tokens: int = _MAX_TOKENS,
        rows: int = DEFAULT_ROWS,
        fresh: bool = True,
        skip_bad_rows: bool = False,
    ):
        self._encode = encode
        self._dataset = dataset
        self._source = find_data(dataset, "sharegpt")
        self._faults = RowFaults(str(dataset), FLAG, boolean("skip_bad_rows", skip_bad_rows))
        self._not_used = ""
        self._max_input = integer("max_input", max_input)
        self._max_tokens = integer("max_tokens", max_tokens)
        self._limit = integer("rows", rows)
        self._fresh = boolean("fresh", fresh)
        self._pairs: list[tuple[list[int], int]] | None = None

    @property
    def name(self) -> str:
        return "sharegpt"

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    def notes(self) -> list[str]:
        return [line for line in (self._faults.note(), self._not_used) if line]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "sharegpt",
            "dataset": self._dataset,
            "max_input": self._max_input,
            "max_tokens": self._max_tokens,
            "rows": self._limit,
            "fresh": self._fresh,
        } | ({"skip_bad_rows": True} if self._faults.skip else {})

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        pairs = self._read()
        pool = sorted({token for ids, _ in pairs for token in ids})
        order = passes(len(pairs), seed)
        specs = []
        for _ in range(count):
            row, salt = next(order)
            ids, output = pairs[row]
            ids = salt_ids(ids, salt, pool) if self._fresh else ids
            specs.append(RequestSpec(input_tokens=len(ids), output_tokens=output, prompt_ids=ids))
        return specs

    def _read(self) -> list[tuple[list[int], int]]:
        """The used conversations as (prompt ids, output tokens)."""
        if self._pairs is not None:
            return self._pairs
        if self._encode is None:
            raise BenchError("workload sharegpt needs a tokenizer: pass --tokenizer")
        found = read_rows(self._source, self._limit, self._faults)
        chats = [pair for pair in map(_first_pair, found) if pair is not None]
        texts = [text for pair in chats for text in pair]
        ids: list[list[int]] = []
        for i in range(0, len(texts), _ENCODE_BATCH):
            ids += self._encode(texts[i : i + _ENCODE_BATCH])
        pairs = [(ids[2 * i], len(ids[2 * i + 1])) for i in range(len(chats))]
        self._pairs = [pair for pair in pairs if self._fits(len(pair[0]), pair[1])]
        if not self._pairs:
            raise BenchError(
                f"none of the {len(found)} rows of {self._dataset} is a conversation in ShareGPT's format with a "
                f"prompt of up to {self._max_input} and {self._max_tokens} tokens in all (--dataset)"
            )
        if len(self._pairs) < len(found):
            self._not_used = (
                f"{self._dataset}: using {len(self._pairs)} of {len(found)} rows: {len(found) - len(chats)} do not "
                f"begin with a question and an answer, {len(chats) - len(self._pairs)} are shorter than {_MIN_TOKENS} "
                f"tokens or longer than max_input {self._max_input} or max_tokens {self._max_tokens}"
            )
        return self._pairs

    def _fits(self, inputs: int, outputs: int) -> bool:
        return (
            min(inputs, outputs) >= _MIN_TOKENS and inputs <= self._max_input and inputs + outputs <= self._max_tokens
        )


def _first_pair(row: dict[str, Any]) -> tuple[str, str] | None:
    """The question and answer at the beginning of a conversation; None if it begins otherwise."""
    turns = row.get("conversations") or row.get("conversation")
    if not isinstance(turns, list):
        return None
    messages = [
        (t.get("from") or t.get("role"), t.get("value") or t.get("content")) for t in turns if isinstance(t, dict)
    ]
    messages = [(role, content) for role, content in messages if role != "system"]
    if (
        len(messages) < 2
        or messages[0][0] not in ("human", "user")
        or messages[1][0] not in ("gpt", "assistant", "chatgpt", "bard")
    ):
        return None
    question, answer = text_of(messages[0][1]), text_of(messages[1][1])
    return (question, answer) if question is not None and answer is not None else None


class JsonLines:
    """Rows of {"prompt": text or token ids} or {"messages": […]}, with "output_tokens" or the workload's `output`."""

    def __init__(
        self,
        *,
        dataset: str | None = None,
        output: Length = DEFAULT_OUTPUT,
        rows: int | None = None,
        fresh: bool = True,
        skip_bad_rows: bool = False,
    ):
        self._dataset = dataset
        source = find_data(dataset, "jsonl")
        if not isinstance(source, Path) or not source.is_file():
            raise BenchError(f"workload jsonl: {dataset} is not a file (--dataset)")
        self._output = length("output", output)
        self._limit = None if rows is None else integer("rows", rows)
        self._fresh = boolean("fresh", fresh)
        self._faults = RowFaults(source, FLAG, boolean("skip_bad_rows", skip_bad_rows))
        found = read_json_rows(source, self._limit, self._faults)
        self._rows = [spec for row in found if (spec := self._read(row)) is not None]
        self._faults.check()
        if not self._rows:
            raise BenchError(f"{source} contains no usable rows (--dataset)")
        self._pool = sorted({token for row in self._rows for token in row.prompt_ids or ()})

    @property
    def name(self) -> str:
        stem = Path(str(self._dataset)).stem
        return f"jsonl {stem}/{length_text(self._output)}"

    @property
    def max_tokens(self) -> int:
        return max(
            row.input_tokens + (row.output_tokens or self._output[1]) + (0 if row.prompt_ids else 16)
            for row in self._rows
        )

    def notes(self) -> list[str]:
        return [self._faults.note()] if self._faults.found else []

    def describe(self) -> dict[str, Any]:
        known: dict[str, Any] = {
            "kind": "jsonl",
            "dataset": self._dataset,
            "output": length_field(self._output),
            "fresh": self._fresh,
        }
        known |= {"skip_bad_rows": True} if self._faults.skip else {}
        return known | ({"rows": self._limit} if self._limit is not None else {})

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng([seed, 1])
        order = passes(len(self._rows), seed)
        specs = []
        for _ in range(count):
            row, salt = next(order)
            specs.append(self._spec(self._rows[row], salt if self._fresh else None, draw(rng, self._output)))
        return specs

    def _spec(self, row: RequestSpec, salt: str | None, output: int) -> RequestSpec:
        ids, text, messages = row.prompt_ids, row.prompt_text, row.messages
        if salt is not None:
            ids = salt_ids(list(ids), salt, self._pool) if ids is not None else None
            text = salt_text(text, salt) if text is not None else None
            messages = _salted(messages, salt) if messages is not None else None
        return RequestSpec(row.input_tokens, row.output_tokens or output, ids, messages, text)

    def _read(self, row: DataRow) -> RequestSpec | None:
        """The row as a request, with output_tokens 0 if it has none; None if it is bad, with an entry in `_faults`."""
        prompt, messages, output = (row.fields.get(name) for name in ("prompt", "messages", "output_tokens"))
        tokens = _tokens(output)
        fault = f"output_tokens must be a number of tokens, not {output!r}" if tokens is None else ""
        if (prompt is None) == (messages is None):
            fault = fault or "must have either prompt or messages"
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
            prompt = prompt[0]
        fault = fault or (_prompt_fault(prompt) if prompt is not None else chat_fault(messages))
        if fault or tokens is None:
            self._faults.add(row.where, fault, joint=": ")
            return None
        if isinstance(prompt, str):
            return RequestSpec(math.ceil(len(prompt) / _CHARACTERS_PER_TOKEN), tokens, prompt_text=prompt)
        if prompt is not None:
            return RequestSpec(len(prompt), tokens, prompt_ids=prompt)
        chat = chat_messages(messages or [])
        characters = sum(_characters(message.get("content")) for message in chat)
        return RequestSpec(math.ceil(characters / _CHARACTERS_PER_TOKEN), tokens, messages=chat)


def _tokens(value: Any) -> int | None:
    """A token count, 0 if there is none; None if the value is something else."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return None
    return int(value) if value == int(value) else None


def _prompt_fault(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) > 1 and all(isinstance(text, str) for text in prompt):
        return f"prompt contains {len(prompt)} texts: put each into its own row"
    if isinstance(prompt, str) and prompt:
        return ""
    if isinstance(prompt, list) and prompt and all(type(token) is int and 0 <= token < 2**31 for token in prompt):
        return ""
    return "prompt must be a non-empty text or list of token ids"


def _characters(content: Any) -> int:
    if isinstance(content, str):
        return len(content) + 16
    return sum(len(part.get("text") or "") if part["type"] == "text" else 3000 for part in content or ()) + 16


def _salted(messages: list[dict[str, Any]], salt: str) -> list[dict[str, Any]]:
    """The messages with the salt in the first one, since prefix caches match from the beginning."""
    first = dict(messages[0])
    content = first.get("content")
    if isinstance(content, str):
        first["content"] = salt_text(content, salt)
    else:
        first["content"] = [{"type": "text", "text": salt_text("", salt).strip()}, *(content or [])]
    return [first, *messages[1:]]
