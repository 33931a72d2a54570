"""The interface of workloads: named sources of requests, reproducible from a seed."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

Encode = Callable[[list[str]], list[list[int]]]  # texts -> token ids, without special tokens


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request to send; exactly one of `prompt_ids`, `prompt_text` and `messages` is set."""

    input_tokens: int  # exact for token ids, an estimate for texts and messages
    output_tokens: int  # requested: sent as max_tokens
    prompt_ids: "list[int] | array[int] | None" = None  # sent to /v1/completions
    messages: list[dict[str, Any]] | None = None  # sent to /v1/chat/completions
    prompt_text: str | None = None  # sent to /v1/completions


class Workload(Protocol):
    """A source of requests that depends only on its description and a seed."""

    @property
    def name(self) -> str:
        """Its name in figures, such as "500/2000"."""
        ...

    @property
    def max_tokens(self) -> int:
        """Largest input + output of one request, in tokens."""
        ...

    def notes(self) -> list[str]:
        """Messages about its data, such as skipped rows; complete after requests() was called."""
        ...

    def describe(self) -> dict[str, Any]:
        """Plain data from which make_workload() builds the same workload."""
        ...

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        """The first `count` requests under `seed`; a larger count continues the same sequence."""
        ...
