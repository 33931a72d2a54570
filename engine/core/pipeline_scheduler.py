"""The scheduler of pipeline stages (`--pp`): steps follow each other through the stages, several at a time.

A slot decodes only once its last token is known, since the stage that embeds this token gets it from the one that
samples. The chunks of a prompt need no tokens of steps in flight, so they follow each other at once.

If all slots decoded in one step, one stage would work and the others would wait. They are divided over as many steps as
there are stages. Example with two stages and four slots that decode:

    stage 0    step 1: 0, 1    step 2: 2, 3    step 3: 0, 1    step 4: 2, 3
    stage 1                    step 1: 0, 1    step 2: 2, 3    step 3: 0, 1
"""

import numpy as np
from numpy.typing import NDArray

from engine.core.feature_mirror import FeatureMirror
from engine.core.scheduler import Scheduler
from engine.core.spill_scheduler import SpillScheduler
from engine.core.steps import ScheduledStep, StepOutcome
from engine.messages import StepResult
from engine.resolved_config import ResolvedConfig


class PipelineScheduler(Scheduler):
    """Of the slots that can decode, each step takes a share."""

    def __init__(self, config: ResolvedConfig, features: FeatureMirror | None = None):
        super().__init__(config, features)
        self._stages = config.pipeline_stages
        self._decoding_steps: set[int] = set()  # steps in flight in which slots decode
        self._share = np.zeros(self.slots.count, np.bool_)  # slots that may decode in the step being scheduled
        self._last_slot = -1  # of the newest step that decodes

    def schedule(self, now: float, max_steps: int = 1) -> ScheduledStep | None:
        self._share = self._choose_share()
        return super().schedule(now, max_steps)

    def _choose_share(self) -> NDArray[np.bool_]:
        """The slots that may decode in the next step; none while each stage has a step in which slots decode.

        A step more would leave each of them fewer slots. Slots take turns.
        """
        slots, share = self.slots, np.zeros(self.slots.count, np.bool_)
        ready = np.flatnonzero(super()._is_decode() & (slots.num_tokens == slots.num_scheduled_tokens))
        if not len(ready) or len(self._decoding_steps) >= self._stages:
            return share
        decoding = slots.live & (slots.num_scheduled_tokens - slots.num_computed_tokens <= 1)
        most = -(-int(decoding.sum()) // self._stages)
        begin = int(np.searchsorted(ready, self._last_slot, side="right"))
        share[np.roll(ready, -begin)[:most]] = True
        return share

    def _is_decode(self) -> NDArray[np.bool_]:
        return super()._is_decode() & self._share

    def schedule_decodes(self) -> NDArray[np.intp]:
        decoding = super().schedule_decodes()
        if len(decoding):
            self._decoding_steps.add(self.counters.steps + 1)
            self._last_slot = self._newest(decoding)
        return decoding

    def _newest(self, decoding: NDArray[np.intp]) -> int:
        """The last of the slots in the order in which they take turns."""
        before = decoding[decoding <= self._last_slot]
        return int(before[-1] if len(before) else decoding[-1])

    def update(self, step: ScheduledStep, result: StepResult) -> StepOutcome:
        self._decoding_steps.discard(step.step)
        return super().update(step, result)


class PipelineSpillScheduler(PipelineScheduler, SpillScheduler):
    """With `--kv-spill`: each stage copies its part of a block."""
