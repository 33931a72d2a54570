"""The scheduler of a model that pools: a request ends with the vector of its prompt, and samples no tokens."""

import numpy as np

from engine.columns import float32s
from engine.core.disaggregated_scheduler import DisaggregatedScheduler, DisaggregatedSpillScheduler
from engine.core.feature_mirror import FeatureMirror
from engine.core.pipeline_scheduler import PipelineScheduler, PipelineSpillScheduler
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.spill_scheduler import SpillScheduler
from engine.core.steps import ScheduledStep, StepOutcome
from engine.messages import Finished, FinishReason, StepResult
from engine.pooling import Pooled
from engine.resolved_config import ResolvedConfig


def make_scheduler(config: ResolvedConfig, features: FeatureMirror | None) -> Scheduler:
    """The scheduler of a configuration."""
    if config.pools:
        return PoolingScheduler(config, features)
    if config.pipeline_stages > 1:
        return (PipelineSpillScheduler if config.host_blocks else PipelineScheduler)(config, features)
    if config.role:
        return (DisaggregatedSpillScheduler if config.host_blocks else DisaggregatedScheduler)(config, features)
    return SpillScheduler(config, features) if config.host_blocks else Scheduler(config, features)


class PoolingScheduler(Scheduler):
    """Prompts are scheduled as those of requests that generate one token; the vector takes the place of the token."""

    def request_error(self, request: Request) -> str | None:
        most = self.config.max_model_len
        if not 0 < request.num_prompt_tokens <= most:
            return f"the prompt has {request.num_prompt_tokens} tokens; 1 to {most} can be served (--max-model-len)"
        return None

    def update(self, step: ScheduledStep, result: StepResult) -> StepOutcome:
        """Book the vectors of a step; those of slots that have another request by now are dropped."""
        kept = self.slots.generation[step.slots] == step.generations
        vectors = float32s(result.vectors).reshape(len(step.slots), -1) if len(step.slots) else np.empty((0, 0))
        pooled: list[Pooled] = []
        finished: list[Finished] = []
        for index in np.flatnonzero(kept).tolist():
            request = self._free_slot(int(step.slots[index]))
            pooled.append(Pooled(request.handle, vectors[index].tobytes()))
            finished.append(self._finish(request, FinishReason.STOP))
        nothing = np.empty(0, np.int32)
        return StepOutcome(np.empty(0, np.int64), nothing, kept, finished, None, pooled=tuple(pooled))
