"""A request as the core sees it, from arrival to its last token."""

from engine.core.hashing import NO_KEYS, extend_hashes, item_keys, root_hash
from engine.messages import AddRequest, int32s


class Request:
    """What must outlive a row: a preempted request gives its row away and keeps this."""

    __slots__ = (
        "arrived",
        "block_hashes",
        "handle",
        "item_keys",
        "items_end",
        "limit",
        "message",
        "preemptions",
        "prompt_len",
        "root",
        "row",
        "started",
        "tokens",
    )

    def __init__(self, message: AddRequest, max_model_len: int, arrived: float):
        self.message = message
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
        self.root = root_hash(message.cache_salt, message.adapter)
        self.block_hashes: list[bytes] = []
        self.item_keys = NO_KEYS  # what its items add to them

    def hash_prompt(self, block_size: int) -> None:
        """Name all full blocks of the prompt; done where the message arrives, off the loop."""
        if self.message.items:
            self.item_keys = item_keys(self.message.items, block_size)
        extend_hashes(self.block_hashes, self.root, self.message.prompt, block_size, self.item_keys)
