"""What the ranks of pipeline stages send each other: hidden states to the next stage, tokens back to all earlier ones.

    stage 0 ──hidden states──► stage 1 ──hidden states──► stage 2
       ▲                          ▲                        │
       └──────────tokens──────────┴────────────────────────┘

The first stage also sends the last one, which returns the results, why multimodal inputs could not be encoded. With
`--tp` each rank of a stage exchanges them with the ranks that have its number in the other stages. Sending does not
wait for the receiver, so a stage goes on with the next step.
"""

import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from engine.arrays import Int64s
from engine.model.stage import Stage
from engine.worker.gloo_group import GlooGroup, lost
from engine.worker.rank_causes import CAUSE_BYTES, agreement, pack_causes, unpack_cause

HIDDEN, TOKENS, CAUSES = 0, 1, 2  # tags of messages; those of one tag arrive in order


class StageGroup(GlooGroup):
    """The ranks with one number in all stages; `rank` is the number of the stage."""

    def send(self, tensor: Tensor, to: int, tag: int) -> Any:
        """Begin to send a tensor, which must stay as it is until the returned work has been waited for."""
        try:
            return self._group.send([tensor], to, tag)
        except RuntimeError as error:
            raise lost(error) from error

    def wait(self, work: Any) -> None:
        """Wait until a tensor has been received."""
        try:
            work.wait()
        except RuntimeError as error:
            raise lost(error) from error

    def receive(self, out: Tensor, source: int, tag: int) -> None:
        """Wait for a tensor of the size of `out`."""
        try:
            self._group.recv([out], source, tag).wait()
        except RuntimeError as error:
            raise lost(error) from error


class StageLinks:
    """The links of one rank to the other stages.

    Args:
        stage: of the rank.
        group: of all stages.
        most_in_flight: `ResolvedConfig.most_steps_in_flight`. What was sent for a step has been received once that many
            later steps have been sampled.
    """

    def __init__(self, stage: Stage, group: StageGroup, most_in_flight: int):
        self.stage = stage
        self.waited_s = 0.0  # in all, for hidden states and causes
        self._group = group
        # By tag, what may be on its way, and how many messages at most.
        self._sent: dict[int, deque[tuple[Any, Tensor]]] = {HIDDEN: deque(), TOKENS: deque(), CAUSES: deque()}
        self._most_sent = {HIDDEN: most_in_flight, TOKENS: most_in_flight * stage.number, CAUSES: most_in_flight}

    def receive_hidden(self, out: Tensor) -> None:
        """Wait for the hidden states of the next step, [tokens, hidden], from the stage before."""
        began = time.perf_counter()
        self._group.receive(out, self.stage.number - 1, HIDDEN)
        self.waited_s += time.perf_counter() - began

    def send_hidden(self, hidden: Tensor) -> None:
        """Send the hidden states of a step to the next stage. They must not change any more."""
        self._send(hidden.contiguous(), self.stage.number + 1, HIDDEN)

    def send_tokens(self, tokens: Int64s) -> None:
        """Send what the last stage has sampled in a step to all others."""
        copy = torch.from_numpy(tokens.copy())
        for number in range(self.stage.number):
            self._send(copy, number, TOKENS)

    def receive_tokens(self, count: int) -> Int64s:
        """Wait for the tokens of the oldest step whose tokens have not been received.

        `count`: how many it sampled, behind draft tokens too.
        """
        tokens = torch.empty(count, dtype=torch.int64)
        self._group.receive(tokens, self.stage.count - 1, TOKENS)
        found: Int64s = tokens.numpy()
        return found

    def send_causes(self, causes: list[str]) -> None:
        """Send why each input that a step asks for could not be encoded from the first stage to the last one."""
        self._send(pack_causes(causes), self.stage.count - 1, CAUSES)

    def receive_causes(self, count: int) -> list[str]:
        """Wait for the causes of a step in the last stage; `count`: inputs that it asks for."""
        packed = torch.empty(count, CAUSE_BYTES, dtype=torch.uint8)
        began = time.perf_counter()
        self._group.receive(packed, 0, CAUSES)
        self.waited_s += time.perf_counter() - began
        return [unpack_cause(one) for one in packed.numpy()]

    def agree(self, cause: str) -> str:
        """The first cause that a stage passes; "": each has passed "". All stages must call it."""
        return agreement(self._group)([cause])[0]

    def wait(self) -> None:
        """Wait for all stages."""
        self._group.smallest(0)

    def _send(self, tensor: Tensor, to: int, tag: int) -> None:
        sent = self._sent[tag]
        sent.append((self._group.send(tensor, to, tag), tensor))
        while len(sent) > self._most_sent[tag]:
            self._group.wait(sent.popleft()[0])
