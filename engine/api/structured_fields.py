"""The fields of a body that constrain its output: OpenAI's response_format, vLLM's structured_outputs and guided_*."""

from typing import Any

import msgspec

from engine.errors import RequestError
from engine.frontend.structured_outputs import OutputForm, StructuredOutputs

TYPES = ("text", "json_object", "json_schema", "structural_tag")
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """`strict` changes nothing: a schema is always enforced."""

    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    json_schema: JsonSchema | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    def wanted(self) -> StructuredOutputs | None:
        """What the output must conform to; None: nothing. Raises RequestError, with the field."""
        name = "response_format"
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True, field=name)
        if self.type == "json_schema":
            if self.json_schema is None or self.json_schema.schema is None:
                raise RequestError("response_format.json_schema.schema is missing", name)
            return StructuredOutputs(json=self.json_schema.schema, field=f"{name}.json_schema.schema")
        if self.type == "structural_tag":
            tag: dict[str, Any] = {"structures": self.structures, "triggers": self.triggers}
            return StructuredOutputs(structural_tag=tag, field=name)
        raise RequestError(f"response_format.type must be one of {', '.join(TYPES)}, not {self.type!r}", name)


class ConstrainedRequest(msgspec.Struct, kw_only=True):
    """The fields about the form of the output; at most one of them may be given."""

    response_format: ResponseFormat | None = None
    structured_outputs: OutputForm | None = None
    guided_json: str | dict[str, Any] | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def wanted_outputs(self) -> StructuredOutputs | None:
        """What the output must conform to. Raises RequestError if several fields say something about it."""
        found: dict[str, StructuredOutputs] = {}
        if self.response_format is not None and (wanted := self.response_format.wanted()) is not None:
            found["response_format"] = wanted
        if (
            self.structured_outputs is not None
            and (wanted := StructuredOutputs.of(self.structured_outputs)) is not None
        ):
            found["structured_outputs"] = wanted
        pattern = self.guided_whitespace_pattern
        for name, kind in GUIDED.items():
            if (value := getattr(self, name)) not in (None, "", []):
                wanted_kind: dict[str, Any] = {kind: value}
                found[name] = StructuredOutputs(**wanted_kind, whitespace_pattern=pattern, field=name)
        if pattern is not None and "guided_json" not in found:
            raise RequestError("guided_whitespace_pattern needs guided_json", "guided_whitespace_pattern")
        if len(found) > 1:
            names = list(found)
            raise RequestError(f"{names[0]} and {names[1]} exclude each other: give only one of them", names[1])
        return next(iter(found.values()), None)
