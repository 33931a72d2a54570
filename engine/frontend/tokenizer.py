"""The tokenizer of a model: encode, decode, chat template, and the end-of-sequence ids."""

import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer as LibraryTokenizer

from engine.errors import ConfigError, ContextLengthError, ModelError, RequestError
from engine.frontend.chat_template import ChatTemplate, read_templates
from engine.frontend.default_templates import default_template, with_inputs
from engine.frontend.mistral_tokenizer import MistralBackend
from engine.frontend.tokenizer_backends import Backend, FastBackend, StandInBackend, load_with_transformers
from engine.model.config.file_names import CONFIG, PARAMS
from engine.multimodal.families import declared_placeholders
from engine.pretrained import AUTO_MAP, custom_code, refuse_custom_tokenizer
from engine.tokenizer_files import PLAIN, find_mistral_tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # one byte in SentencePiece's vocabularies

# Without a tokenizer.json, transformers can build a tokenizer from one of these files.
OTHER_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model", "spm.model")

# The first PROBE_CHARACTERS characters per token that fits show whether a text is too long; texts have about four.
PROBE_CHARACTERS = 8
PROBE_SLACK = 64  # tokens; the last ones of the probe may differ from those of the whole text
NORMALIZED_BYTES = 64
CONTROLS = ("[TOOL_CALLS]", "[/THINK]")  # of Mistral's format, for tool calls and reasoning


class Tokenizer:
    """One model's tokenizer; safe to use from several threads."""

    def __init__(self, backend: Backend, *, eos_ids: Iterable[int] = (), template: ChatTemplate | None = None):
        self.backend = backend
        self.vocab_size = backend.vocab_size
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.special_ids = backend.special_ids()
        self.template = template
        self._pieces: dict[int, bytes] = {}

    @functools.cached_property
    def leading_ids(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer puts before each text, e.g. begin-of-sequence."""
        empty = self.encode("")
        return tuple(empty) if self.encode("a")[: len(empty)] == empty else ()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens)

    def encode_pair(self, text: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of a pair of texts with special tokens, and the type of each: 0, or 1 from the second text on."""
        return self.backend.encode_pair(text, second)

    def encode_prompt(self, text: str, add_special_tokens: bool, max_tokens: int) -> list[int]:
        """As `encode`, for a text of at most `max_tokens` tokens.

        Raises RequestError if the beginning of the text has more already. The rest, which could take minutes, is not
        tokenized then. A text that is only slightly too long is encoded whole.
        """
        beginning = PROBE_CHARACTERS * max_tokens
        if len(text) > 2 * beginning:
            found = len(self.encode(text[:beginning], add_special_tokens))
            if found > max_tokens + max_tokens // 4 + PROBE_SLACK:
                raise ContextLengthError.of(
                    max_tokens, f"the first {beginning:,} of {len(text):,} characters have {found:,} tokens", "prompt"
                )
        return self.encode(text, add_special_tokens)

    @functools.cached_property
    def longest_token(self) -> int:
        """The most bytes of text that one token stands for."""
        longest = self.backend.longest_token()
        # Normalizers of such tokenizers may shorten a text: they merge spaces and compose characters.
        return longest if self.concatenates else max(longest, NORMALIZED_BYTES)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens)

    @property
    def concatenates(self) -> bool:
        return self.backend.concatenates

    def piece(self, token: int) -> bytes:
        """The bytes of a token (cached); only if `concatenates`."""
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self.backend.piece(token)
        return found

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds in the middle of a text."""
        if self.concatenates:
            return self.piece(token)
        found = self._pieces.get(token)
        if found is None:
            found = self._pieces[token] = self._bytes_within(token)
        return found

    def _bytes_within(self, token: int) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(entry := self.backend.vocabulary_entry(token))
        once = self.backend.decode([token], False)
        if byte is not None and once != entry:
            return bytes([int(byte[1], 16)])
        # Decoders drop the space before the first word of a text; after itself, a token keeps its space.
        twice = self.backend.decode([token, token], False)
        return (twice[len(once) :] if twice.startswith(once) else once).encode()

    def token_text(self, token: int) -> str:
        """One token as text, for logprobs; incomplete characters become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def written_token(self, token: int) -> str:
        """The text that becomes this special token when it is tokenized; empty if there is none."""
        text = self.backend.vocabulary_entry(token)
        return text if text and token in self.encode(text, add_special_tokens=False) else ""

    @property
    def chat_source(self) -> str:
        """The source of the chat template, or the control tokens of Mistral's own format; empty without either."""
        if isinstance(self.backend, MistralBackend):
            return " ".join(text for text in CONTROLS if self.backend.id_of(text) is not None)
        return "" if self.template is None else self.template.source

    @property
    def takes_tools(self) -> bool:
        """Whether the chat format has tools."""
        return isinstance(self.backend, MistralBackend) or (self.template is not None and self.template.takes_tools)

    def render_chat(self, messages: list[dict[str, Any]], **options: Any) -> str | list[int]:
        """Write a conversation as a prompt: a text with its special tokens, or token ids (Mistral's tokenizers).

        `options` are those of `ChatTemplate.render`. Raises RequestError without a chat template, or if it fails.
        """
        if isinstance(self.backend, MistralBackend):
            options.pop("placeholders", None)  # it writes those of its own format
            return self.backend.encode_chat(messages, **options)
        if self.template is None:
            raise RequestError("the model has no chat template: use /v1/completions", "messages")
        return self.template.render(messages, **options)


def load_tokenizer(
    path: Path, vocab_size: int | None = None, mode: str = "auto", chat_template: str | None = None
) -> tuple[Tokenizer, list[str]]:
    """Load the tokenizer of a model folder, or the one next to a config.json.

    Args:
        path: the folder, or its config.json.
        vocab_size: of the model. With it, a folder without any tokenizer file gets a stand-in.
        mode: mistral reads Mistral's own files; auto does so if there is no tokenizer.json.
        chat_template: replaces the model's.

    Returns:
        The tokenizer, and warnings for the user.

    Raises:
        ModelError: there is no tokenizer, or it can't be read.
    """
    folder, config = (path, read_json(path / CONFIG)) if path.is_dir() else (path.parent, read_json(path))
    own = mistral_file(folder, mode)
    if own is not None and chat_template is not None:
        raise ConfigError(f"--chat-template can't be used with {own.name}, which has its own chat format")
    if own is not None:
        mistral = MistralBackend(own)
        return Tokenizer(mistral, eos_ids=known_ids([mistral.eos_id, *declared_eos_ids(folder)], vocab_size)), []
    settings = tokenizer_settings(folder)
    warnings: list[str] = []
    backend: Backend
    if (folder / "tokenizer.json").is_file():
        backend = load_fast(folder / "tokenizer.json", settings)
        if custom_code(settings, "AutoTokenizer") is not None:
            warnings.append(f"{folder}: the tokenizer's own code ({AUTO_MAP}) is not run; its tokenizer.json is used")
    elif any((folder / name).is_file() for name in OTHER_TOKENIZER_FILES):
        backend, found = load_with_transformers(folder)
        settings = found | settings
    elif vocab_size is not None:
        refuse_custom_tokenizer(folder)
        backend = StandInBackend(vocab_size, declared_placeholders(config))
        warnings.append(
            f"{folder} has no tokenizer: a stand-in reads texts as bytes and writes a text for each token id"
        )
    else:
        raise ModelError(f"{folder} has no tokenizer (tokenizer.json); use --tokenizer")
    named = special_tokens(settings)
    own_eos = backend.id_of(named["eos_token"]) if "eos_token" in named else None
    eos = ([] if own_eos is None else [own_eos]) + declared_eos_ids(folder)
    family = config.get("model_type")
    given = None if chat_template is None else {"default": chat_template}
    sources = given or with_inputs(family, read_templates(folder, settings))
    if not sources:
        found_template = default_template(family, stand_in=isinstance(backend, StandInBackend))
        sources = {} if found_template is None else {"default": found_template}
    template = None
    try:
        if "default" in sources:
            template = ChatTemplate(sources.pop("default"), named, sources)
    except TemplateError as error:
        if chat_template is not None:
            raise ConfigError(f"--chat-template can't be read: {error}") from error
        warnings.append(f"{folder}: the chat template can't be read ({error}), so chats are rejected")
    return Tokenizer(backend, eos_ids=known_ids(eos, vocab_size), template=template), warnings


def mistral_file(folder: Path, mode: str) -> Path | None:
    """The tokenizer file that mistral-common reads, None for another tokenizer. Raises ModelError if it is missing."""
    native = (folder / PARAMS).is_file() and not (folder / CONFIG).is_file()
    if mode != "mistral" and (folder / "tokenizer.json").is_file():
        return None
    found = find_mistral_tokenizer(folder)
    if found is None and (native or mode == "mistral") and (folder / PLAIN).is_file():
        found = folder / PLAIN
    if found is None and mode == "mistral":
        raise ModelError(
            f"{folder} has no tekken.json or tokenizer.model.v3, which --tokenizer-mode mistral needs; use --tokenizer"
        )
    return found


def known_ids(ids: Iterable[int], vocab_size: int | None) -> list[int]:
    return [token for token in ids if vocab_size is None or token < vocab_size]


def load_fast(file: Path, settings: dict[str, Any]) -> FastBackend:
    try:
        library = LibraryTokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{file} can't be read: {error}") from error
    bos = special_tokens(settings).get("bos_token")
    bos_id = library.token_to_id(bos) if bos is not None else None
    wanted = settings.get("add_bos_token")
    return FastBackend(library, (wanted, bos_id) if isinstance(wanted, bool) and bos_id is not None else None)


def declared_eos_ids(folder: Path) -> list[int]:
    """End-of-sequence ids of generation_config.json, or else of config.json; either may hold one or a list."""
    config = read_json(folder / "config.json")
    for source in (read_json(folder / "generation_config.json"), config, text_config(config)):
        found = source.get("eos_token_id")
        if found is not None:
            return [_token_id(token, folder) for token in (found if isinstance(found, list) else [found])]
    return []


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the language model within that of a composite model; empty for another model."""
    found = config.get("text_config")
    return found if isinstance(found, dict) else {}


def _token_id(value: Any, folder: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ModelError(f"{folder}: eos_token_id must be an integer or a list of integers, not {json.dumps(value)}")
    return int(value)


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """The settings of tokenizer_config.json, with the special tokens of all files that may hold them.

    As in transformers, special_tokens_map.json takes precedence.
    """
    settings = read_json(folder / "tokenizer_config.json")
    extra = settings.get("extra_special_tokens")
    return (extra if isinstance(extra, dict) else {}) | settings | read_json(folder / "special_tokens_map.json")


def special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The named special tokens, e.g. `eos_token`, as text; files have a string or an object with `content`."""
    named: dict[str, str] = {}
    for name, value in settings.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named


def read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file} can't be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}
