"""What a workload is: a named source of requests, the same ones for the same seed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Encode = Callable[[list[str]], list[list[int]]]  # texts -> token ids, without special tokens


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request to send; lengths in tokens, exactly one of `prompt_ids`, `prompt_text` and `messages` is set."""

    input_tokens: int  # exact for token-id prompts, an estimate for text and messages
    output_tokens: int  # asked: sent as max_tokens with ignore_eos
    prompt_ids: list[int] | None = None  # sent to /v1/completions
    messages: list[dict[str, Any]] | None = None  # sent to /v1/chat/completions
    prompt_text: str | None = None  # sent to /v1/completions


class Workload(Protocol):
    """A source of requests that depends on nothing but its description and a seed."""

    @property
    def name(self) -> str:
        """As on figures: "500/2000"."""
        ...

    @property
    def max_tokens(self) -> int:
        """Largest input + output of one request, in tokens."""
        ...

    def notes(self) -> list[str]:
        """What should be known of its data, such as rows left out; complete once requests were made."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain data from which make_workload() builds the same workload again."""
        ...

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        """The first `count` requests under `seed`; a larger count continues the same sequence."""
        ...
