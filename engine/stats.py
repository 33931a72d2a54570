"""Gauges and counters of a core, which it sends to its front ends."""

import msgspec


class MMStats(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Gauges and counters of multimodal inputs in the core."""

    mirror_queries: int = 0  # inputs of requests that arrived
    mirror_hits: int = 0  # of them, inputs whose features were here already
    mirror_misses: int = 0  # of them, inputs whose features should have been here and were not
    mirror_bytes: int = 0
    encoder_queries: int = 0  # inputs of which a step began to compute the placeholders
    encoder_hits: int = 0  # of them, inputs whose embeddings were on the device
    encoder_embeddings: int = 0  # on the device


class SpillStats(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Gauges and counters of `--kv-spill`, in KV blocks."""

    host_blocks: int = 0  # that there are
    host_used: int = 0  # of them, those with content
    disk_blocks: int = 0  # the most files
    disk_used: int = 0  # whole files
    spilled: int = 0  # copied to host memory
    lost: int = 0  # evicted while no host block could be reused
    host_hits: int = 0  # copied back, found in host memory
    disk_hits: int = 0  # copied back, first read from a file
    disk_written: int = 0
    disk_read: int = 0
    disk_faults: int = 0  # files that could not be written, or read as they were written


class Stats(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Gauges, and counters since the EngineCore started."""

    running: int = 0
    waiting: int = 0
    kv_cache_usage: float = 0.0  # 0..1
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the prefix cache
    prefix_hits: int = 0  # of them, tokens found
    prompt_tokens: int = 0  # of admitted requests
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0  # tokens scheduled in the last step
    last_step_at: float = 0.0  # the core's clock
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # With prefill/decode disaggregation:
    kv_transfers: int = 0  # prompts requested from prefill replicas whose blocks arrived, or are lost
    kv_transfers_lost: int = 0  # of them, those of which blocks were lost or could not be used
    kv_blocks_sent: int = 0
    kv_blocks_received: int = 0
    kv_blocks_rejected: int = 0  # of them, those that could not be used
    mm: MMStats | None = None  # None: no request had multimodal inputs
    spill: SpillStats | None = None  # None: without --kv-spill
