"""What the scheduler counts."""

from dataclasses import dataclass

from engine.core.draft_tokens import DraftTokenTracker
from engine.stats import MMStats, Stats


@dataclass(slots=True)
class Counters:
    """Since the EngineCore started, but for `step_tokens`; names as in `engine.stats.Stats`.

    num_lost_tokens: computed tokens of preempted requests.
    """

    num_preemptions: int = 0
    num_lost_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0

    def stats(
        self,
        *,
        running: int,
        waiting: int,
        kv_cache_usage: float,
        last_step_at: float,
        drafts: DraftTokenTracker | None,
        mm: MMStats | None,
    ) -> Stats:
        """These counters with the gauges of the present; args as of `Stats`."""
        return Stats(
            running=running,
            waiting=waiting,
            kv_cache_usage=kv_cache_usage,
            preemptions=self.num_preemptions,
            prefix_queries=self.prefix_queries,
            prefix_hits=self.prefix_hits,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            steps=self.steps,
            step_tokens=self.step_tokens,
            last_step_at=last_step_at,
            num_draft_tokens=drafts.num_draft_tokens if drafts else 0,
            num_accepted_tokens=drafts.num_accepted_tokens if drafts else 0,
            mm=mm,
        )
