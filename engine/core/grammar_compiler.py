"""Compiles grammars with llguidance, on any thread: the library releases the GIL meanwhile."""

import json
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from engine.core.json_schemas import check_schema
from engine.errors import INTERRUPTS, RequestError
from engine.grammar import WORD_BITS, Grammar

# At each place where JSON allows white space: one space, or a line break with an indentation. A model that writes white
# space only would never end.
WHITESPACE = r"( |\n[ \t]{0,40})"
MAX_LEXER_STATES = 50_000  # 1 to 2 kB each
WRONG_TOKEN = "doesn't satisfy the grammar"  # in the library's error; its other errors are limits that were reached
UNSATISFIABLE = ("NoExtension", "NoExtensionBias")  # the library's errors of grammars without any output


class Vocabulary(Protocol):
    """The tokens of a model."""

    @property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of each id; empty: it is never sampled under a grammar."""
        ...

    @property
    def special_ids(self) -> Sequence[int]: ...

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, whose pieces are its bytes."""
        ...


class _TokenizerSource:
    """What llguidance builds its tokenizer from. Its end token is one beyond the vocabulary, see `GrammarCompiler`."""

    is_tokenizer_wrapper = True
    eos_token_id = None
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary):
        self.tokens = list(vocabulary.pieces)
        self.special_token_ids = list(vocabulary.special_ids)
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class GrammarCompiler:
    """Makes matchers of grammars. A mask has one more bit than the vocabulary: whether the output may end here."""

    def __init__(self, load: Callable[[], Vocabulary]):
        """`load` is called when the vocabulary is first needed."""
        self._load = load
        self._loading = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._tokenizer: Any = None
        self._special: set[str] = set()
        self.vocab_size = 0
        self.mask_words = 0  # of one mask

    @property
    def vocabulary(self) -> Vocabulary:
        """The tokens of the model. Raises RequestError if there is no tokenizer."""
        with self._loading:
            if self._vocabulary is None:
                found = self._load()
                special = [found.pieces[token] for token in found.special_ids]
                self._special = {text.decode("utf-8", "replace") for text in special}
                self.vocab_size = len(found.pieces)
                self.mask_words = self.vocab_size // WORD_BITS + 1
                self._vocabulary = found
            return self._vocabulary

    def compile(self, grammar: Grammar) -> Any:
        """An LLMatcher in its initial state. Raises RequestError if the grammar can't be used."""
        try:
            import llguidance
        except ImportError as error:
            raise RequestError(f"structured output needs the package llguidance ({error})") from error
        vocabulary = self.vocabulary
        with self._loading:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(_TokenizerSource(vocabulary))  # type: ignore[arg-type]
        limits = llguidance.LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
        try:
            text = self._source(grammar)
            matcher = llguidance.LLMatcher(self._tokenizer, text, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # also finds grammars that no output can begin
        except INTERRUPTS:
            raise
        except BaseException as error:  # a panic of the library is a BaseException
            raise RequestError(" ".join(str(error).split())) from error
        if matcher.is_error():
            cause = error_of(matcher)
            raise RequestError("no output conforms to it" if cause in UNSATISFIABLE else cause)
        return matcher.deep_copy()

    def _source(self, grammar: Grammar) -> str:
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import gbnf_to_lark

        if grammar.kind == "json_schema":
            schema = json.loads(grammar.text)
            options = schema.pop("x-guidance", {})
            return LLMatcher.grammar_from_json_schema(with_options(schema, options))
        if grammar.kind == "structural_tag":
            return structural_tag(json.loads(grammar.text), self._special)
        if grammar.kind == "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        return LLMatcher.grammar_from_lark(gbnf_to_lark(grammar.text) if grammar.kind == "ebnf" else grammar.text)


def error_of(matcher: Any) -> str:
    """The error of an LLMatcher, in one line."""
    return " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())


def with_options(schema: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A checked schema with the library's options: those given, and ours. Raises RequestError."""
    escapes = check_schema(schema)
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE, "json_allowed_escapes": escapes, **options}}


def structural_tag(tag: dict[str, Any], special: set[str]) -> str:
    """A Lark grammar of free text in which each of the triggers is followed by one of the tags.

    Args:
        tag: `triggers`, and `structures`: each with `begin`, `schema` and `end`.
        special: texts of the special tokens, which no text contains.
    """
    rules, names = [], []
    for number, one in enumerate(tag["structures"]):
        trigger = next((text for text in tag["triggers"] if one["begin"].startswith(text)), None)
        if not trigger:
            raise RequestError(f"structures[{number}].begin doesn't start with one of the triggers")
        rest, end = one["begin"][len(trigger) :], one["end"]
        body = f"{_quoted(rest)} %json {json.dumps(with_options(one['schema'], {}))} {_quoted(end)}"
        names.append(f"tag_{number}")
        if trigger in special:
            rules.append(f"tag_{number}: TEXT {trigger} {body}")
        else:
            rules.append(f"tag_{number}_trigger[lazy]: TEXT {_quoted(trigger)}")
            rules.append(f"tag_{number}: tag_{number}_trigger {body}")
    if not names:
        raise RequestError("structures is empty")
    return "\n".join([f"start: ({' | '.join(names)})* TEXT", r"TEXT: /(.|\n)*/", *rules])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
