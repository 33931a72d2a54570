"""A request as the core sees it, from arrival to its last token."""

from engine.config import ResolvedConfig
from engine.core.hashing import NO_KEYS, extend_hashes, item_keys, root_hash
from engine.messages import AddRequest, int32s


class Request:
    """What must outlive a row: a preempted request gives its row away and keeps this."""

    __slots__ = (
        "adapter",
        "arrived",
        "block_hashes",
        "handle",
        "item_keys",
        "items_end",
        "limit",
        "message",
        "preemptions",
        "prompt_len",
        "reads_cache",
        "root",
        "row",
        "started",
        "stop_ids",
        "tokens",
    )

    def __init__(self, message: AddRequest, max_model_len: int, arrived: float, adapter: str | None = None):
        """`adapter` is the key of the message's adapter, see engine.core.adapters; its name unless given."""
        self.message = message
        self.adapter = message.adapter if adapter is None else adapter
        self.stop_ids = frozenset(message.stop_ids)
        self.handle = message.handle
        self.tokens = int32s(message.prompt)  # all known tokens, while the request has no row
        self.prompt_len = len(self.tokens)
        self.limit = min(self.prompt_len + message.max_tokens, max_model_len)
        last = message.items[-1] if message.items else None
        self.items_end = last.offset + last.length if last else 0
        self.arrived = arrived
        self.started = False  # had a row before
        self.row = -1
        self.preemptions = 0
        # Logprobs of the prompt come with its computation: what is in the cache has none.
        self.reads_cache = message.sampling.prompt_logprobs < 0
        self.root = root_hash(message.cache_salt, self.adapter)
        self.block_hashes: list[bytes] = []
        self.item_keys = NO_KEYS  # what its items add to them

    def refusal(self, config: ResolvedConfig, *, whole: bool) -> str | None:
        """Why a request of this length can't be served; `whole`: a prompt is computed in one step."""
        if not 0 < self.prompt_len < config.max_model_len:
            return f"the prompt has {self.prompt_len} tokens; 1 to {config.max_model_len - 1} can be served"
        if whole and self.limit > config.max_num_batched_tokens:
            return (
                f"the request may reach {self.limit} tokens, but without chunking at most "
                f"{config.max_num_batched_tokens} are computed at once (--max-num-batched-tokens)"
            )
        return None

    def hash_prompt(self, block_size: int) -> None:
        """Name all full blocks of the prompt; done where the message arrives, off the loop."""
        if self.message.items:
            self.item_keys = item_keys(self.message.items, block_size)
        extend_hashes(self.block_hashes, self.root, self.message.prompt, block_size, self.item_keys)
