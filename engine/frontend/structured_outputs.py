"""StructuredOutputs: what the text of an output must conform to."""

import asyncio
import json
import re
from collections.abc import Coroutine
from typing import Any, Protocol

import msgspec

from engine.errors import OverloadedError, RequestError
from engine.grammar import MAX_GRAMMAR_BYTES, TOO_MANY, Grammar

MAX_CHOICES = 4096
MAX_COMPILE_S = 30.0  # for a grammar that is compiled, and those before it
# A rule of EBNF; Lark's have one colon.
_EBNF_RULE = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)
KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


class OutputForm(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What an output must conform to, as vLLM's `structured_outputs` of a request's body gives it; not checked yet.

    Attributes:
        json: a JSON schema, as an object or as text.
        regex: a regular expression in the syntax of Rust's regex crate, which the whole output matches.
        choice: the output is one of these texts.
        grammar: a grammar in Lark's syntax (as llguidance extends it), or in EBNF with a rule `root`.
        json_object: the output is any JSON object.
        structural_tag: free text in which triggers are followed by tags: {"structures": [{"begin", "schema", "end"}],
            "triggers": [...]}, as an object or as text.
        disable_any_whitespace: JSON is written without white space.
        whitespace_pattern: a regular expression for the white space of JSON, wherever it may be.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class StructuredOutputs(OutputForm, kw_only=True, frozen=True):
    """What an output must conform to; exactly one of the kinds is given. A wrong value raises RequestError.

    Attributes, besides those of `OutputForm`:
        field: the field of the request that errors name.
    """

    field: str = "structured_outputs"

    @classmethod
    def of(cls, form: OutputForm) -> "StructuredOutputs | None":
        """Check what a body gives; None: it gives nothing."""
        return None if form == OutputForm() else cls(**msgspec.structs.asdict(form))

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None and getattr(self, kind) is not False]
        if len(given) != 1:
            what = " and ".join(given) if given else "nothing"
            raise self.error(f"exactly one of {', '.join(KINDS)} must be given, not {what}")
        text = self.to_grammar().text
        if len(text.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
            raise self.error(f"the grammar has more than {MAX_GRAMMAR_BYTES >> 10} KiB")

    def error(self, message: str) -> RequestError:
        return RequestError(f"{self.field}: {message}", self.field)

    def to_grammar(self) -> Grammar:
        """The grammar that is sent to the core."""
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("lark", self._choice(self.choice))
        if self.grammar is not None:
            return Grammar("ebnf" if _EBNF_RULE.search(self.grammar) else "lark", self.grammar)
        if self.structural_tag is not None:
            return Grammar("structural_tag", json.dumps(self._structural_tag(self.structural_tag)))
        schema = {"type": "object"} if self.json_object else self._schema()
        options: dict[str, Any] = {}
        if self.whitespace_pattern is not None:
            options["whitespace_pattern"] = self.whitespace_pattern
        elif self.disable_any_whitespace:
            options |= {"whitespace_flexible": False, "whitespace_pattern": None}
        return Grammar("json_schema", json.dumps({**schema, "x-guidance": options} if options else schema))

    def _schema(self) -> dict[str, Any]:
        schema = self._parsed("json", self.json)
        if schema is True:
            return {}
        if not isinstance(schema, dict):
            raise self.error(f"the JSON schema must be an object, not {json.dumps(schema)[:80]}")
        return {key: value for key, value in schema.items() if key != "x-guidance"}

    def _choice(self, choice: list[str]) -> str:
        if not choice or len(choice) > MAX_CHOICES or not all(isinstance(one, str) and one for one in choice):
            raise self.error(f"choice must have 1 to {MAX_CHOICES} texts, none of them empty")
        return "start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, choice))

    def _structural_tag(self, given: str | dict[str, Any]) -> dict[str, Any]:
        tag = self._parsed("structural_tag", given)
        form = '{"structures": [{"begin": …, "schema": …, "end": …}], "triggers": […]}'
        try:
            found = msgspec.convert(tag, _Tag)
        except msgspec.ValidationError as error:
            raise self.error(f"structural_tag must be {form}: {error}") from error
        for number, one in enumerate(found.structures):
            if not any(trigger and one.begin.startswith(trigger) for trigger in found.triggers):
                raise self.error(f"structures[{number}].begin doesn't start with one of the triggers")
        if not found.structures:
            raise self.error("structures is empty")
        built: dict[str, Any] = msgspec.to_builtins(found)
        return built

    def _parsed(self, name: str, given: Any) -> Any:
        if not isinstance(given, str):
            return given
        try:
            return json.loads(given)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{name} isn't valid JSON: {error}") from error


class _Structure(msgspec.Struct):
    begin: str
    end: str
    schema: dict[str, Any] = {}


class _Tag(msgspec.Struct):
    structures: list[_Structure]
    triggers: list[str]


class GrammarClient(Protocol):
    """The part of a client that `check_grammar` uses."""

    def check_grammar(self, grammar: Grammar) -> Coroutine[Any, Any, str]: ...


async def check_grammar(client: GrammarClient, wanted: StructuredOutputs | None) -> None:
    """Compile a grammar in the core, before its request is sent.

    Raises RequestError if it can't be used or takes too long, OverloadedError if too many others wait.
    """
    if wanted is None:
        return
    try:
        cause = await asyncio.wait_for(client.check_grammar(wanted.to_grammar()), MAX_COMPILE_S)
    except TimeoutError as error:
        raise wanted.error(f"the grammar was not compiled within {MAX_COMPILE_S:g} s") from error
    if cause == TOO_MANY:
        raise OverloadedError(cause)
    if cause:
        raise wanted.error(cause)
