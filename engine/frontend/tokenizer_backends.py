"""Text to token ids and back: several implementations of one protocol.

Most tokenizers concatenate: the bytes of a text are those of its tokens, one after the other. They implement `piece`,
and detokenizing takes one table lookup per token. All others are decoded in windows.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders

from engine.pretrained import load_auto_tokenizer


class Backend(Protocol):
    vocab_size: int
    concatenates: bool  # whether `piece` is implemented

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def encode_pair(self, text: str, second: str) -> tuple[list[int], list[int]]:
        """See `Tokenizer.encode_pair`."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...

    def piece(self, token: int) -> bytes:
        """The bytes of one token, empty for an unknown id; only if `concatenates`."""
        ...

    def vocabulary_entry(self, token: int) -> str:
        """One token as the vocabulary writes it, e.g. `▁the` or `<0xE6>`; empty for an unknown id."""
        ...

    def id_of(self, token: str) -> int | None: ...

    def special_ids(self) -> frozenset[int]: ...

    def longest_token(self) -> int:
        """Bytes of the longest token."""
        ...


class FastBackend:
    """A tokenizer.json, run by the tokenizers library."""

    def __init__(self, library: LibraryTokenizer, add_bos: tuple[bool, int] | None = None):
        """`add_bos` (wanted, id) overrides how the file handles the begin-of-sequence token."""
        library.no_truncation()
        library.no_padding()
        self._library = library
        self.vocab_size = library.get_vocab_size(with_added_tokens=True)
        self.concatenates = isinstance(library.decoder, decoders.ByteLevel)
        self._bytes_of_character = {character: byte for byte, character in enumerate(byte_characters())}
        self._add_bos = add_bos

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        # Unlike `encode` of tokenizers 0.23, this releases the GIL and computes no offsets, which are not needed.
        [encoding] = self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        if add_special_tokens and self._add_bos is not None:
            wanted, bos = self._add_bos
            present = ids[:1] == [bos]
            if wanted and not present:
                ids.insert(0, bos)
            elif present and not wanted and self._library.encode("", add_special_tokens=True).ids[:1] == [bos]:
                del ids[0]
        return ids

    def encode_pair(self, text: str, second: str) -> tuple[list[int], list[int]]:
        encoding = self._library.encode(text, second)
        return encoding.ids, encoding.type_ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._library.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def piece(self, token: int) -> bytes:
        written: str | None = self._library.id_to_token(token)
        if written is None:
            return b""
        try:
            return bytes([self._bytes_of_character[character] for character in written])
        except KeyError:  # an added token written in plain text
            return written.encode()

    def vocabulary_entry(self, token: int) -> str:
        return self._library.id_to_token(token) or ""

    def id_of(self, token: str) -> int | None:
        found: int | None = self._library.token_to_id(token)
        return found

    def special_ids(self) -> frozenset[int]:
        added = self._library.get_added_tokens_decoder()
        return frozenset(token for token, entry in added.items() if entry.special)

    def longest_token(self) -> int:
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        if self.concatenates:  # one character per byte
            return max(map(len, vocabulary), default=1)
        return longest_text(vocabulary)


class SlowBackend:
    """A tokenizer that only transformers can run, because it can't be converted to a tokenizer.json."""

    concatenates = False

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return ids

    def encode_pair(self, text: str, second: str) -> tuple[list[int], list[int]]:
        found = self._tokenizer(text, second, return_token_type_ids=True)
        return found["input_ids"], found["token_type_ids"]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def piece(self, token: int) -> bytes:
        raise NotImplementedError("this tokenizer does not concatenate")

    def vocabulary_entry(self, token: int) -> str:
        return str(self._tokenizer.convert_ids_to_tokens(token) or "")

    def id_of(self, token: str) -> int | None:
        found: int | None = self._tokenizer.convert_tokens_to_ids(token)
        return found

    def special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def longest_token(self) -> int:
        return longest_text(self._tokenizer.get_vocab())


class StandInBackend:
    """For weights without a tokenizer: a text becomes its UTF-8 bytes, and each id has a distinct text.

    An ASCII id is its character, any other id is `<id>`, so that random weights produce text with each token. Reserved
    ids, which stand for images and the like, are `<id>` too; the character of such an id becomes a space.
    """

    concatenates = True
    written = re.compile(r"<(\d+)>|.", re.DOTALL)

    def __init__(self, vocab_size: int, reserved: frozenset[int] = frozenset()):
        self.vocab_size = vocab_size
        self._reserved = reserved
        self._of_byte = [ord(" ") if byte in reserved else min(byte, vocab_size - 1) for byte in range(256)]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:  # noqa: ARG002
        ids: list[int] = []
        for match in self.written.finditer(text):
            number = match.group(1)
            if number is not None and (128 <= int(number) < self.vocab_size or int(number) in self._reserved):
                ids.append(int(number))
            else:
                ids += [self._of_byte[byte] for byte in match.group().encode()]
        return ids

    def encode_pair(self, text: str, second: str) -> tuple[list[int], list[int]]:
        ids = [*self.encode(text, True), *self.encode(second, False)]
        return ids, [0] * len(ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:  # noqa: ARG002
        return b"".join(map(self.piece, ids)).decode()

    def piece(self, token: int) -> bytes:
        return bytes([token]) if 0 <= token < 128 and token not in self._reserved else b"<%d>" % token

    def vocabulary_entry(self, token: int) -> str:
        return self.piece(token).decode()

    def id_of(self, token: str) -> int | None:  # noqa: ARG002
        return None

    def special_ids(self) -> frozenset[int]:
        return frozenset()

    def longest_token(self) -> int:
        return len(b"<%d>" % (self.vocab_size - 1))


def longest_text(texts: Iterable[str]) -> int:
    return max((len(text.encode("utf-8", "surrogatepass")) for text in texts), default=1)


def byte_characters() -> list[str]:
    """The character for each byte in a byte-level vocabulary: itself if it is printable, else one from U+0100 on."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def load_with_transformers(folder: Path) -> tuple[Backend, dict[str, Any]]:
    """Load a tokenizer without a tokenizer.json, with its settings as a tokenizer_config.json has them.

    The only function of this module that imports transformers. Raises ModelError if transformers can't read the files.
    """
    tokenizer = load_auto_tokenizer(str(folder))
    library = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "_tokenizer", None)
    settings = dict(tokenizer.special_tokens_map) | {"chat_template": getattr(tokenizer, "chat_template", None)}
    return FastBackend(library) if isinstance(library, LibraryTokenizer) else SlowBackend(tokenizer), settings
