"""Prefill/decode disaggregation (`--prefill-replicas P --decode-replicas D`): its roles and its limits.

The first P replicas compute prompts, the other D generate the outputs. The KV blocks of a prompt are sent from one to
the other (`engine.kv_transfer`), so no prompt of another request delays the tokens of a stream.
"""

from typing import Protocol

from engine.errors import ConfigError

PREFILL, DECODE = "prefill", "decode"
TRANSFER_SHARE = 8  # of the KV blocks, those that may be on their way


class Options(Protocol):
    """The options of an engine that matter here; an EngineConfig."""

    @property
    def prefill_replicas(self) -> int: ...

    @property
    def replica(self) -> int: ...

    @property
    def enable_prefix_caching(self) -> bool: ...

    @property
    def simulated(self) -> str: ...

    @property
    def pipeline_parallel_size(self) -> int: ...

    @property
    def ablations(self) -> frozenset[str]: ...


def role_of(config: Options) -> str:
    """PREFILL or DECODE; empty: each replica does both."""
    if not config.prefill_replicas:
        return ""
    return PREFILL if config.replica < config.prefill_replicas else DECODE


def count_replicas(prefill: int, decode: int, replicas: int) -> int:
    """The number of replicas of both roles; `replicas` is --dp, 1 if it was not given.

    Raises ConfigError if the three do not fit together.
    """
    if prefill < 1 or decode < 1:
        raise ConfigError(
            f"--prefill-replicas ({prefill}) and --decode-replicas ({decode}) must both be at least 1: a prompt is "
            "computed by one and continued by the other"
        )
    if replicas not in (1, prefill + decode):
        raise ConfigError(
            f"--dp {replicas} is not the sum of --prefill-replicas {prefill} and --decode-replicas {decode}: leave "
            "--dp out"
        )
    return prefill + decode


def check_disaggregation(config: Options) -> None:
    """Raise ConfigError for options that do not work with disaggregation."""
    if not config.enable_prefix_caching:
        raise refusal("blocks that arrive enter the prefix cache: leave out --no-enable-prefix-caching")
    if config.simulated:
        raise refusal("simulated hardware has no KV blocks to send: leave out --device sim:")
    if config.pipeline_parallel_size > 1:
        raise refusal("pipeline stages do not send blocks: use --tp in place of --pp")
    if config.ablations:
        raise refusal("it needs all parts of V1: leave out --ablate, or --engine v0")


def refusal(why: str) -> ConfigError:
    """The error that something does not work with disaggregation."""
    return ConfigError(f"--prefill-replicas does not work here: {why}")


def num_transfer_blocks(num_blocks: int, per_request: int) -> int:
    """The blocks in main memory for prompts on their way, of a replica with `num_blocks` KV blocks.

    One prompt must fit, of a request that takes up to `per_request` blocks. More let prompts arrive while earlier ones
    wait for a slot.
    """
    return max(per_request, num_blocks // TRANSFER_SHARE)
