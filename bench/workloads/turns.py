"""Conversations of several turns: each request has the whole history of its conversation as its prefix.

In an open loop, arrivals are turns. A fixed number of conversations is active; each has one turn per round, in a seeded
order, and a conversation that has ended is replaced by a new one. The replies in a history are drawn from the seed,
since the server's replies are not known in advance. A prefix cache therefore hits the earlier prompts of a
conversation, but not the server's last reply, which is computed together with the new question.
"""

from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench.workloads.base import RequestSpec
from bench.workloads.fields import integer
from bench.workloads.tokens import RandomTokens

DEFAULT_TURNS = 4
DEFAULT_CONVERSATIONS = 8


@dataclass(slots=True)
class _Conversation:
    history: "array[int]" = field(default_factory=lambda: array("i"))
    turn: int = 0


class MultiTurn(RandomTokens):
    """`conversations` concurrent conversations of `turns` turns; `input` and `output` are the tokens of one turn."""

    kind = "multi-turn"

    def __init__(self, *, turns: int = DEFAULT_TURNS, conversations: int = DEFAULT_CONVERSATIONS, **lengths: Any):
        super().__init__(**lengths)
        self._turns = integer("turns", turns)
        self._conversations = integer("conversations", conversations)

    @property
    def name(self) -> str:
        side_by_side = f" x{self._conversations}" if self._conversations != DEFAULT_CONVERSATIONS else ""
        return f"multi-turn {self._turns}x{super().name}{side_by_side}"

    @property
    def max_tokens(self) -> int:
        return self._turns * super().max_tokens

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"turns": self._turns, "conversations": self._conversations}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng(seed)
        # Conversations start at different turns, so that the first requests are as long as later ones on average.
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
        request = self._request(rng, conversation.history)
        assert isinstance(request.prompt_ids, array)
        conversation.history = request.prompt_ids + self._draw(rng, request.output_tokens)
        conversation.turn += 1
        return request
