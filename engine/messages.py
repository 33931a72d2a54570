"""Every message that crosses a process boundary: msgspec structs of columns.

Columns of numbers travel as little-endian bytes (`column()` packs, `int32s()` and its kin read without a copy). An
optional part that is absent costs a byte or none.

    front end ──AddRequest, Abort, Utility, Shutdown──► EngineCore ──StepMessage──► workers
    front end ◄─Ready, Outputs, UtilityResult, Dead──── EngineCore ◄──StepResult─── workers
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.columns import unpack_table

Int32s = NDArray[np.int32]

HANDLE_SEQUENCE_BITS = 48  # a handle is (front end << 48) | sequence


def make_handle(front_end: int, sequence: int) -> int:
    return front_end << HANDLE_SEQUENCE_BITS | sequence


def front_end_of(handle: int) -> int:
    return handle >> HANDLE_SEQUENCE_BITS


def column(values: Sequence[int] | Sequence[Sequence[int]] | NDArray[Any], kind: str = "<i4") -> bytes:
    """Pack numbers as little-endian bytes, int32 unless told."""
    return np.asarray(values, dtype=kind).tobytes()


def int32s(data: bytes, width: int = 1) -> Int32s:
    """Read an int32 column, as [n] or, with a width, as [n, width]; a read-only view."""
    flat = np.frombuffer(data, dtype="<i4")
    return flat if width == 1 else flat.reshape(-1, width)


def int64s(data: bytes) -> NDArray[np.int64]:
    return np.frombuffer(data, dtype="<i8")


def float32s(data: bytes, width: int = 1) -> NDArray[np.float32]:
    flat = np.frombuffer(data, dtype="<f4")
    return flat if width == 1 else flat.reshape(-1, width)


class FinishReason(IntEnum):
    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3  # the request can't be served: its sender can mend that
    FAILED = 4  # the engine failed over it
    NOT_SERVED = 5  # it names an adapter that isn't there, or no longer
    SHUT_DOWN = 6  # it came while the engine was shutting down


class Sampling(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What a worker must know to sample one row; the front end draws the seed where the user gave none."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int = 0  # unsigned 64 bit
    logprobs: int = -1  # -1: none; k >= 0: the sampled token's and the k likeliest
    min_tokens: int = 0  # before that many output tokens, `stop_ids` can't be sampled
    stop_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: bytes = b""  # int32: the only tokens that can be sampled; empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # of each, the last token can't follow the ones before it
    prompt_logprobs: int = -1  # -1: none; k >= 0: of each prompt token, and of the k most likely in its place

    @property
    def adjusts(self) -> bool:
        """Whether it changes logits before a token is chosen."""
        return bool(
            self.logit_bias
            or self.allowed
            or self.bad_words
            or (self.min_tokens and self.stop_ids)
            or self.repetition_penalty != 1.0
            or self.presence_penalty
            or self.frequency_penalty
        )

    @property
    def special(self) -> bool:
        """Whether the logits themselves are needed, by more than the likeliest token or a draw at a temperature."""
        filters = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return filters or self.logprobs >= 0 or self.adjusts

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        return not (self.temperature or self.special)


# ---------------------------------------------------------------------------------------------- front end -> EngineCore


class Writing(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a request's tokens are written as text, for a core that does so itself."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True


class ItemRef(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """An item (image, audio) in a prompt: a range of placeholder tokens, as many as it has embeddings."""

    hash: bytes  # of the content, with all that shapes its embeddings
    offset: int  # its first placeholder's position
    length: int
    bidirectional: bool = False  # its placeholders attend to each other: they are computed in one step


class AddRequest(msgspec.Struct, array_like=True, frozen=True, tag=0, gc=False):
    handle: int
    prompt: bytes  # int32[tokens]
    max_tokens: int  # output tokens, at most; the front end has cut it to max_model_len - prompt
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()  # end-of-sequence ids included, unless ignored
    min_tokens: int = 0
    priority: int = 0  # smaller is sooner; only a priority policy looks at it
    cache_salt: str = ""  # prompts share cached blocks only under the same salt
    adapter: str = ""
    # Only for a core with an inline front end: it makes `prompt` of the text, and texts of the tokens.
    text: str = ""
    add_special_tokens: bool = True
    writing: Writing | None = None
    items: tuple[ItemRef, ...] = ()  # in the order of their offsets


class Abort(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    handles: tuple[int, ...]


class Utility(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """A call by name that isn't about one request, e.g. `reset_prefix_cache`; answered by a UtilityResult."""

    front_end: int
    call: int
    method: str
    arguments: dict[str, Any] = {}


class Shutdown(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    """Finish what runs for at most `drain_s` seconds, then end; the rest is aborted."""

    drain_s: float = 0.0


ToCore = AddRequest | Abort | Utility | Shutdown


# ---------------------------------------------------------------------------------------------- EngineCore -> front end


class MemoryLine(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One line of the memory table: what, bytes, and the flag that changes it."""

    what: str
    bytes: int
    flag: str = ""


class Ready(msgspec.Struct, array_like=True, frozen=True, tag=10, gc=False):
    """The EngineCore is up; what the front end must know and the start table shows."""

    model_path: str
    device: str  # in words, e.g. "cpu (2 threads)"
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int  # usable: without the null block
    prefix_caching: bool
    memory: tuple[MemoryLine, ...] = ()
    warnings: tuple[str, ...] = ()
    process_id: int = 0
    seconds: tuple[tuple[str, float], ...] = ()  # start-up ledger: phase, seconds
    scheduling_policy: str = "fcfs"
    removals: tuple[str, ...] = ()  # of engine.config.REMOVALS
    scheduler_steps: int = 1
    kernels: str = ""  # what computes the model, in words
    kv_windows: tuple[int, ...] = (0,)  # of each KV group; 0: it sees all tokens
    sequences: int = 0  # requests of max-model-len that the rows and the blocks hold

    @property
    def inline(self) -> bool:
        """Whether the core reads and writes texts itself."""
        return "inline-frontend" in self.removals


class Finished(msgspec.Struct, array_like=True, frozen=True, gc=False):
    handle: int
    reason: int  # FinishReason
    stop_id: int = -1  # the stop token that ended it, if one of the user's did
    error: str = ""  # with ERROR, FAILED, NOT_SERVED, SHUT_DOWN: the cause, for the user
    preemptions: int = 0
    stop: str = ""  # inline front end: the stop string that ended it
    text: str = ""  # inline front end: what was held back until the end


class Admitted(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request was given a row for the first time."""

    handle: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    waited_s: float
    prompt_tokens: int = 0  # inline front end: of the text


class Stats(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Gauges now, and counters since the EngineCore started."""

    running: int = 0
    waiting: int = 0
    kv_use: float = 0.0  # 0..1
    preemptions: int = 0
    prefix_queries: int = 0  # tokens asked of the prefix cache
    prefix_hits: int = 0  # tokens found
    prompt_tokens: int = 0  # computed or found, at admission
    generation_tokens: int = 0
    steps: int = 0
    step_tokens: int = 0  # tokens scheduled in the last step
    last_step_at: float = 0.0  # the core's clock
    drafted: int = 0  # tokens guessed
    accepted: int = 0  # of them, the right ones


class TokenLogprobs(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Logprobs of the tokens that asked for them; column 0 is the sampled token, 1.. the likeliest in order.

    index: int32[m], positions in `Outputs.tokens` (or in `StepResult.tokens`) · ids: int32[m, width] ·
    values: float32[m, width] · ranks: int32[m], 1 is the likeliest. A row that asked for fewer than width - 1 ignores
    the rest.
    """

    width: int
    index: bytes
    ids: bytes
    values: bytes
    ranks: bytes


def select_logprobs(logprobs: TokenLogprobs, kept: NDArray[np.bool_]) -> TokenLogprobs | None:
    """The entries whose tokens are kept, renumbered to the tokens that remain."""
    index = int32s(logprobs.index)
    entries = kept[index]
    if not entries.any():
        return None
    renumbered = (np.cumsum(kept) - 1).astype(np.int32)
    return TokenLogprobs(
        width=logprobs.width,
        index=renumbered[index[entries]].tobytes(),
        ids=int32s(logprobs.ids).reshape(-1, logprobs.width)[entries].tobytes(),
        values=float32s(logprobs.values).reshape(-1, logprobs.width)[entries].tobytes(),
        ranks=int32s(logprobs.ranks)[entries].tobytes(),
    )


class PromptLogprobs(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Logprobs of some of a prompt's tokens, as a step computed them; `index` of `logprobs` are positions.

    Column 0 is the prompt's own token. The first token has none, since nothing comes before it. A request that is
    preempted has its prompt computed again: positions may come twice, and the first of them count.
    """

    owner: int  # StepResult: the row; Outputs: the handle
    generation: int  # of the row
    logprobs: TokenLogprobs


class Outputs(msgspec.Struct, array_like=True, frozen=True, tag=11, gc=False):
    """What one step (or a rejection) means for one front end."""

    at: float  # the core's clock when the tokens were booked
    handles: bytes = b""  # int64[n]: requests with new tokens
    tokens: bytes = b""  # int32[sum of counts]
    counts: bytes = b""  # int32[n]; absent: one token each
    finished: tuple[Finished, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    logprobs: TokenLogprobs | None = None
    stats: Stats | None = None
    texts: tuple[str, ...] | None = None  # inline front end: one for each handle
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()  # of a request, all before its first token or with it


class UtilityResult(msgspec.Struct, array_like=True, frozen=True, tag=12, gc=False):
    call: int
    result: Any = None
    error: str = ""


class Dead(msgspec.Struct, array_like=True, frozen=True, tag=13, gc=False):
    """The EngineCore can't go on."""

    cause: str


class Hung(msgspec.Struct, array_like=True, frozen=True, tag=14, gc=False):
    """A step takes longer than it may; without a cause: it came back."""

    cause: str = ""


FromCore = Ready | Outputs | UtilityResult | Dead | Hung


# ------------------------------------------------------------------------------------------------ EngineCore -> workers


class RowAdded(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request takes a row. Rows are numbered by the scheduler; a row's generation grows with each new owner."""

    row: int
    generation: int
    tokens: bytes  # int32: all known tokens, prompt first
    prompt_len: int  # output tokens follow after a preemption
    computed: int  # tokens whose KV is in the blocks already (prefix hit)
    blocks: tuple[bytes, ...]  # int32: the block table so far, of each KV group; 0 where a window has left a block
    sampling: Sampling
    adapter: str = ""
    items: tuple[ItemRef, ...] = ()  # `hash` is the key that a worker keeps an item's embeddings by


class StepMessage(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What changed since the last step. A worker applies removed, added, blocks, in this order, then runs.

    Every live row that `chunks` doesn't name computes one token: the one at its position `computed`. A row samples in
    this step if that brings `computed` to the number of its tokens; results come in ascending order of rows.

    A burst is one message for several steps, numbered on from `step`, each with a result of its own: rows that rest in
    the first rest in all, the others compute one token in each.
    """

    step: int
    removed: bytes = b""  # int32[n]: rows
    added: tuple[RowAdded, ...] = ()
    blocks: bytes | tuple[int, bytes] = b""  # int32[n, 3]: row, KV group, block, see `appended`; or n, and that packed
    chunks: bytes = b""  # int32[n, 2]: row, tokens to compute; 0: the row rests
    steps: int = 1
    free_items: tuple[bytes, ...] = ()  # keys of embeddings to forget, before any are made
    encode: tuple[tuple[int, int], ...] = ()  # row, which of its items: to be encoded before the forward pass

    def appended(self) -> Int32s:
        """Row, KV group and block, [n, 3]: each is appended to its row's table of its group, in this order."""
        if isinstance(self.blocks, bytes):
            return int32s(self.blocks, 3)
        count, packed = self.blocks
        return unpack_table(packed, count, 3)

    def following(self) -> "list[StepMessage]":
        """The steps of a burst after the first, as messages of their own."""
        return [StepMessage(step=self.step + later, chunks=self.chunks) for later in range(1, self.steps)]


class StepResult(msgspec.Struct, array_like=True, frozen=True, gc=False):
    step: int
    tokens: bytes  # int32[rows]: sampled tokens, ascending rows
    counts: bytes = b""  # int32[rows], when rows sampled more than one token each (k > 1)
    logprobs: TokenLogprobs | None = None
    seconds: float = 0.0  # device time of the step
    drafted: int = 0  # tokens that were guessed and verified; those that were right are among `tokens`
    refused: bytes = b""  # int32[n, 2]: rows that the worker can't compute, and their generations; see RowAdded.adapter
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_to_core = msgspec.msgpack.Decoder(ToCore)
_from_core = msgspec.msgpack.Decoder(FromCore)
_step = msgspec.msgpack.Decoder(StepMessage)
_result = msgspec.msgpack.Decoder(StepResult)


def encode(message: ToCore | FromCore | StepMessage | StepResult) -> bytes:
    return _encoder.encode(message)


def decode_to_core(data: bytes) -> ToCore:
    return _to_core.decode(data)


def decode_from_core(data: bytes) -> FromCore:
    return _from_core.decode(data)


def decode_step(data: bytes) -> StepMessage:
    return _step.decode(data)


def decode_result(data: bytes) -> StepResult:
    return _result.decode(data)
