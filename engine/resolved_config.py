"""The configuration of the scheduler and the workers; `engine.memory` makes it of an `EngineConfig`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig:
    """The configuration of the scheduler and the workers, with every choice made."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int  # includes the null block, number 0
    kv_windows: tuple[int, ...] = (0,)  # of each KV group: tokens that a query sees, its own included; 0: all
    enable_prefix_caching: bool
    encoder_cache_tokens: int = 0  # embeddings that stay on the device; 0: as the token budget
    kv_part_bytes: tuple[int, ...] = (0,)  # of a KV block on each rank
    host_blocks: int = 0  # KV blocks in main memory that keep what the KV cache evicts (--kv-spill); 0: none
    disk_blocks: int = 0  # KV blocks in files, likewise
    scheduling_policy: str = "fcfs"
    ablations: frozenset[str] = frozenset()
    draft_tokens: int = 0  # most draft tokens per decoding request and step
    scheduler_steps: int = 1  # v0 only: decode steps per run of the scheduler
    tile_table: str = ""  # the file with measured tiles of attention; empty: those that come with the kernels
    pools: bool = False  # requests end with the vector of their prompt, and sample no tokens
    role: str = ""  # see engine.disaggregation
    transfer_blocks: int = 0  # host blocks for blocks of prompts on their way to or from other replicas
    whole_prompts: bool = False  # each prompt is computed in one step, as its vector depends on all hidden states
    pipeline_stages: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "ablations", frozenset(self.ablations))  # messages carry lists
        object.__setattr__(self, "kv_windows", tuple(self.kv_windows))
        object.__setattr__(self, "kv_part_bytes", tuple(self.kv_part_bytes))

    @property
    def most_tokens(self) -> int:
        """Tokens of a request; the vector of a prompt counts as one more."""
        return self.max_model_len + self.pools

    @property
    def most_steps_in_flight(self) -> int:
        """Steps that may be submitted and not yet booked: each stage runs one, and another one waits for the first.

        That one is scheduled and submitted while the others run, so that no stage waits for the scheduler.
        """
        return self.pipeline_stages + 1
