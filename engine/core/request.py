"""A request as the core sees it, from its arrival to its last token."""

from typing import Any

from engine.columns import int32s
from engine.core.hashing import NO_KEYS, extend_hashes, mm_block_keys, root_hash
from engine.messages import AddRequest
from engine.resolved_config import ResolvedConfig

MOST_INTERVALS = 64  # reported of one request


class Request:
    """The state that a request keeps without a slot: while it waits, and after a preemption."""

    __slots__ = (
        "adapter", "arrived", "block_hashes", "handle", "hash_root", "matcher", "max_num_tokens", "message",
        "mm_block_keys", "mm_inputs_end", "num_preemptions", "num_prompt_tokens", "preempted", "preempted_at",
        "reads_prefix_cache", "slot", "stop_ids", "tokens", "was_admitted",
    )  # fmt: skip

    def __init__(self, message: AddRequest, max_model_len: int, arrived: float, adapter: str | None = None):
        """`adapter` is the key of the message's adapter (see engine.core.adapters); None: its name."""
        self.message = message
        self.adapter = message.adapter if adapter is None else adapter
        self.stop_ids = frozenset(message.stop_ids)
        self.handle = message.handle
        self.tokens = int32s(message.prompt)  # all known tokens, up to date while the request has no slot
        self.num_prompt_tokens = len(self.tokens)
        self.max_num_tokens = min(self.num_prompt_tokens + message.max_tokens, max_model_len)
        last = message.mm_inputs[-1] if message.mm_inputs else None
        self.mm_inputs_end = last.offset + last.length if last else 0
        self.arrived = arrived
        self.was_admitted = False
        self.slot = -1
        self.num_preemptions = 0
        self.preempted_at = 0.0  # the last time
        self.preempted: tuple[tuple[float, float], ...] = ()  # times until it had a slot again
        self.matcher: Any = None  # of its grammar, after all known output tokens; see engine.core.grammars
        # Logprobs of prompt tokens are computed with the prompt, and cached blocks have none.
        self.reads_prefix_cache = message.sampling.prompt_logprobs < 0
        self.hash_root = root_hash(message.cache_salt, self.adapter)
        self.block_hashes: list[bytes] = []
        self.mm_block_keys = NO_KEYS  # what its multimodal inputs add to the hashes

    def resume(self, now: float) -> None:
        """It has a slot again after a preemption."""
        if len(self.preempted) < MOST_INTERVALS:
            self.preempted += ((self.preempted_at, now),)

    def length_error(self, config: ResolvedConfig, *, whole_prompts: bool) -> str | None:
        """Why a request of this length can't be served. With `whole_prompts`, prompts are computed in one step."""
        if not 0 < self.num_prompt_tokens < config.max_model_len:
            return f"the prompt has {self.num_prompt_tokens} tokens; 1 to {config.max_model_len - 1} can be served"
        if whole_prompts and self.max_num_tokens > config.max_num_batched_tokens:
            return (
                f"the request may reach {self.max_num_tokens} tokens, but without chunking at most "
                f"{config.max_num_batched_tokens} are computed at once (--max-num-batched-tokens)"
            )
        return None

    def hash_prompt(self, block_size: int) -> None:
        """Hash all full blocks of the prompt; called on the input thread."""
        if self.message.mm_inputs:
            self.mm_block_keys = mm_block_keys(self.message.mm_inputs, block_size, self.message.prompt)
        extend_hashes(self.block_hashes, self.hash_root, self.message.prompt, block_size, self.mm_block_keys)
