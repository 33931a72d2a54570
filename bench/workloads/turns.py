"""Conversations of several turns: each request carries the whole history of its conversation as its prefix.

Open loop: arrivals are turns, whatever conversation they belong to. A fixed number of conversations goes on side by
side; they take their turns in a seeded order, each once a round, and one that has ended makes room for a new one. The
replies in a history come from the seed, as those of the server can't be known ahead. So a prefix cache finds what
earlier turns sent, but not what the server itself wrote: the last reply is computed together with the new question.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.workloads.base import RequestSpec
from bench.workloads.fields import Length, draw, id_range, length, plain, show, whole

DEFAULT_TURNS = 4
DEFAULT_CONVERSATIONS = 8


@dataclass(slots=True)
class _Conversation:
    history: list[int] = field(default_factory=list)
    turn: int = 0


class MultiTurn:
    """`conversations` of `turns` turns each, side by side; `input` and `output` are the tokens of one turn."""

    def __init__(
        self,
        *,
        vocab_size: int | None,
        input: Length,
        output: Length,
        turns: int = DEFAULT_TURNS,
        conversations: int = DEFAULT_CONVERSATIONS,
    ):
        self._ids = id_range(vocab_size)
        self._input = length("input", input)
        self._output = length("output", output)
        self._turns = whole("turns", turns)
        self._conversations = whole("conversations", conversations)

    @property
    def name(self) -> str:
        side_by_side = f" x{self._conversations}" if self._conversations != DEFAULT_CONVERSATIONS else ""
        return f"multi-turn {self._turns}x{show(self._input)}/{show(self._output)}{side_by_side}"

    @property
    def max_tokens(self) -> int:
        return self._turns * (self._input[1] + self._output[1])

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "multi-turn",
            "input": plain(self._input),
            "output": plain(self._output),
            "turns": self._turns,
            "conversations": self._conversations,
        }

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        # They start at different turns, so that the first requests are already as long as the later ones.
        live = [self._begun(rng, i) for i in range(self._conversations)]
        specs: list[RequestSpec] = []
        while len(specs) < count:
            for i in rng.permutation(self._conversations).tolist():
                if live[i].turn == self._turns:
                    live[i] = _Conversation()
                specs.append(self._turn(rng, live[i]))
        return specs[:count]

    def _begun(self, rng: np.random.Generator, number: int) -> _Conversation:
        conversation = _Conversation()
        for _ in range(number % self._turns):
            self._turn(rng, conversation)
        return conversation

    def _turn(self, rng: np.random.Generator, conversation: _Conversation) -> RequestSpec:
        inputs, outputs = draw(rng, self._input), draw(rng, self._output)
        prompt = conversation.history + rng.integers(*self._ids, size=inputs).tolist()
        conversation.history = prompt + rng.integers(*self._ids, size=outputs).tolist()
        conversation.turn += 1
        return RequestSpec(input_tokens=len(prompt), output_tokens=outputs, prompt_ids=prompt)
