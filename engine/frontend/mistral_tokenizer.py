"""Mistral's own tokenizers (tekken.json, tokenizer.model.v3), run by mistral-common, for texts and chats.

A conversation is encoded without a text in between, so that a user's text can never become a control token.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import ModelError, RequestError
from engine.frontend.content_forms import text_of
from engine.frontend.parsing.call_ids import with_mistral_ids
from engine.text import first_line
from engine.tokenizer_files import TEKKEN

LONGEST_PIECE = 64  # bytes; sentencepiece vocabularies are trained with pieces of at most 16 characters
PACKAGE = "mistral-common[sentencepiece]"
# Parts without data, as mistral-common takes them.
MEDIA: dict[Any, dict[str, Any]] = {
    "image": {"type": "image_url", "image_url": {"url": "data:,"}},
    "audio": {"type": "audio_url", "audio_url": {"url": "data:,"}},
}
# Fields of a message that mistral-common accepts by role. It rejects others, e.g. a user's name, that templates ignore.
ACCEPTED_FIELDS = {
    "system": ("content",),
    "user": ("content",),
    "assistant": ("content", "tool_calls"),
    "tool": ("content", "tool_call_id", "name"),
}


class MistralBackend:
    """A backend (see `engine.frontend.tokenizer_backends`) that encodes chats too."""

    def __init__(self, file: Path):
        """Raises ModelError if the file can't be read, or mistral-common isn't installed."""
        try:
            from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
            from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        except ImportError as error:
            raise ModelError(f"{file} is read by mistral-common: pip install '{PACKAGE}' ({error})") from error
        try:
            self._chats = MistralTokenizer.from_file(str(file))
        except Exception as error:  # a broken file may cause any error
            raise ModelError(f"{file} can't be read: {_reason(error)}") from error
        self._inner: Any = self._chats.instruct_tokenizer.tokenizer
        self._kinds = _write_placeholders(self._chats.instruct_tokenizer)
        self._hide, self._show = SpecialTokenPolicy.IGNORE, SpecialTokenPolicy.KEEP
        self.vocab_size: int = self._inner.n_words
        self.concatenates = file.name == TEKKEN
        self.eos_id: int = self._inner.eos_id
        self._special_ids = frozenset[int](self._inner.special_ids)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._inner.encode(text, bos=add_special_tokens, eos=False)
        return ids

    def encode_pair(self, text: str, second: str) -> tuple[list[int], list[int]]:
        ids = [*self.encode(text, True), *self.encode(second, False)]
        return ids, [0] * len(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        known = [token for token in ids if token < self.vocab_size]
        if skip_special_tokens or self.concatenates:
            policy = self._hide if skip_special_tokens else self._show
            text: str = self._inner.decode(known, special_token_policy=policy)
            return text
        # With special tokens, the library joins sentencepiece's pieces as they are, with ▁ for spaces.
        return "".join(
            "".join(map(self.vocabulary_entry, run)) if is_special else self.decode(list(run), True)
            for is_special, run in itertools.groupby(known, self._special_ids.__contains__)
        )

    def piece(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            return b""
        data: bytes = self._inner.id_to_byte_piece(token, special_token_policy=self._show)
        return data

    def vocabulary_entry(self, token: int) -> str:
        return str(self._inner.id_to_piece(token)) if 0 <= token < self.vocab_size else ""

    def id_of(self, token: str) -> int | None:
        """The id of a special token."""
        found: int | None = self._inner.get_special_token(token) if self._inner.is_special(token) else None
        return found

    def special_ids(self) -> frozenset[int]:
        return self._special_ids

    def longest_token(self) -> int:
        if not self.concatenates:
            return LONGEST_PIECE
        return max(len(self.piece(token)) for token in range(self.vocab_size))

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,  # noqa: ARG002  (the format has no generation prompt)
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        extra: Mapping[str, Any] | None = None,
        tools_as_text: bool = False,  # noqa: ARG002  (the format has tools)
        **others: Any,
    ) -> list[int]:
        """A conversation as token ids. Raises RequestError if the model's chat format does not allow it.

        A part of a content that is an image or a sound ({"type": "image"}) becomes one placeholder token. The last
        message is continued with `continue_final_message`, or if it has `prefix`.
        """
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        if extra:
            names = ", ".join(sorted(extra))
            raise RequestError(f"the model's tokenizer has no template that takes {names}", "chat_template_kwargs")
        for name, value in others.items():
            if value is not None and value != "none":
                field = "chat_template" if name == "template" else name
                raise RequestError(f"the model's tokenizer has no template that takes {field}", field)
        if continue_final_message and messages[-1].get("role") != "assistant":
            raise RequestError("the last message must be the assistant's to be continued", "continue_final_message")
        given = [_accepted(message, self._kinds) for message in messages]
        try:
            request: Any = ChatCompletionRequest.from_openai(given, tools=tools)
            last = request.messages[-1:]
            if last and last[0].role == "assistant":
                last[0].prefix = continue_final_message or bool(messages[-1].get("prefix"))
            ids: list[int] = self._chats.encode_chat_completion(request).tokens
        except Exception as error:  # its checks raise errors of many kinds
            raise RequestError(f"the model's tokenizer rejects these messages: {_reason(error)}", "messages") from error
        return ids


class _Placeholder:
    """Stands in for an encoder of mistral-common: each image or sound becomes one token, and nothing is decoded.

    The processes for multimodal inputs know how many tokens it has; they replace the placeholder.
    """

    def __init__(self, token: int):
        self.tokens = [token]
        self.image, self.audio = np.empty(0), None  # of the types that mistral-common checks for

    def __call__(self, chunk: Any) -> "_Placeholder":  # noqa: ARG002  (has no data)
        return self


def _write_placeholders(instruct_tokenizer: Any) -> frozenset[str]:
    """Replace the encoders of images and sounds; returns the kinds that the tokenizer has settings for."""
    kinds = set()
    if instruct_tokenizer.image_encoder is not None:
        instruct_tokenizer.image_encoder = _Placeholder(instruct_tokenizer.image_encoder.image_token)
        kinds.add("image")
    if instruct_tokenizer.audio_encoder is not None:
        instruct_tokenizer.audio_encoder = _Placeholder(instruct_tokenizer.audio_encoder.audio_token)
        kinds.add("audio")
    return frozenset(kinds)


def _accepted(message: dict[str, Any], kinds: frozenset[str]) -> dict[str, Any]:
    names = ACCEPTED_FIELDS.get(message.get("role", ""), ())
    given = with_mistral_ids({name: message[name] for name in names if message.get(name) is not None})
    if given.get("tool_calls"):
        given["tool_calls"] = [_tool_call(call) for call in given["tool_calls"]]
    return {"role": message.get("role")} | given | {"content": _content(message.get("content"), kinds)}


def _content(content: Any, kinds: frozenset[str]) -> Any:
    """A text, or the parts of a content with images or sounds; their data is not here."""
    inputs = [part["type"] for part in content if part.get("type") in MEDIA] if isinstance(content, list) else []
    if not inputs:
        return text_of(content)
    for kind in inputs:
        if kind not in kinds:
            raise RequestError(f"the model's tokenizer has no settings for inputs of kind {kind}", "messages")
    return [MEDIA.get(part.get("type")) or {"type": "text", "text": part.get("text", "")} for part in content]


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with its arguments as a JSON text again, as in OpenAI's format."""
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call | {"function": function | {"arguments": arguments}}


def _reason(error: Exception) -> str:
    if type(error).__name__ != "ValidationError":
        return first_line(error)
    # A message of pydantic has the field in its second line and the reason in the third.
    return ": ".join([line.strip() for line in str(error).strip().splitlines() if line.strip()][1:3])
