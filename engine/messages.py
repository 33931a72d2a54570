"""Every message that crosses a process boundary: msgspec structs of columns.

Columns of numbers are little-endian bytes (`engine.columns`). An absent optional part costs at most one byte.
The core's parent gets Ready when the core is up (see `engine.core_process`) and passes it on to the front ends.

    front end ──AddRequest, Abort, FreeFeatures, …────────► EngineCore ──StepMessage──► workers
    front end ◄─Ready, Outputs, UtilityResult, Hung, Dead── EngineCore ◄──StepResult─── workers
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import msgspec

from engine.arrays import Int32s
from engine.columns import int32s, unpack_table
from engine.grammar import Grammar
from engine.kv_transfer import KVPush, PrefillEnded, PrefillWanted
from engine.logprob_columns import PromptLogprobs, TokenLogprobs
from engine.multimodal.types import MediaKind, MMSpec
from engine.pooling import Pooled, PoolingSpec
from engine.reasoning import ReasoningBudget
from engine.stats import Stats

HANDLE_SEQUENCE_BITS = 48  # a handle is (front end << 48) | sequence


def make_handle(front_end: int, sequence: int) -> int:
    return front_end << HANDLE_SEQUENCE_BITS | sequence


def front_end_of(handle: int) -> int:
    return handle >> HANDLE_SEQUENCE_BITS


class FinishReason(IntEnum):
    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3  # the request can't be served as it is; the sender can change it
    FAILED = 4  # an error of the engine
    NOT_SERVED = 5  # its adapter is not served (any longer)
    SHUT_DOWN = 6  # it arrived while the engine was shutting down
    NOT_ENCODED = 7  # a multimodal input could not be encoded
    UNREACHABLE = 8  # of a prompt that another replica wants: its blocks can't be sent there


class Sampling(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How tokens of a request are sampled; the front end draws a seed if the user gave none."""

    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: no limit
    min_p: float = 0.0
    seed: int = 0  # unsigned 64 bit
    logprobs: int = -1  # -1: none; k >= 0: of the sampled token and of the top k
    min_tokens: int = 0  # `stop_ids` can't be sampled before this many output tokens
    stop_ids: tuple[int, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed: bytes = b""  # int32: the only tokens that can be sampled; empty: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # the last token of each can't follow the ones before it
    prompt_logprobs: int = -1  # -1: none; k >= 0: of each prompt token and of the top k in its place

    @property
    def adjusts_logits(self) -> bool:
        """Whether logits change before a token is chosen."""
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
    def needs_logits(self) -> bool:
        """Whether more is needed than the greedy token or a plain draw at a temperature."""
        filters = self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)
        return filters or self.logprobs >= 0 or self.adjusts_logits

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the greedy token is all that is needed."""
        return not (self.temperature or self.needs_logits)


# ---------------------------------------------------------------------------------------------- front end -> EngineCore


class TextOptions(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """How a core with an inline front end detokenizes a request."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    visible_ids: tuple[int, ...] = ()  # special tokens that stay in the text all the same


class MMInputRef(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A multimodal input (image, audio, video) of a prompt: a range of tokens, most of which stand for an embedding."""

    hash: bytes  # of the content and of everything else that its embeddings depend on
    offset: int  # position of the first token of the range
    length: int
    bidirectional: bool = False  # its tokens attend to each other, so they are computed in one step
    # Path of the file with the tensors that the encoder needs. In an AddRequest, empty: the core has the file already.
    features: str = ""
    grid: tuple[int, int, int] = (0, 0, 0)  # M-RoPE: frames, rows and columns of its embeddings
    seconds_per_frame: float = 0.0  # M-RoPE: between two frames of the grid of a video
    # The bidirectional inputs of a prompt also attend to each other: all tokens from the first one to the end of the
    # last are computed in one step, and prompts share none of them unless they have the same ones.
    joint: bool = False


class UnplacedInput(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A multimodal input whose placeholder the core's loop replaces, with an inline front end or inline processing."""

    kind: MediaKind
    tokens: bytes = b""  # int32: what replaces the placeholder; the input is the MMInputRef with the same number
    before: str = ""  # text around the placeholder, see `engine.multimodal.types.Processed`
    after: str = ""
    # With --ablate inline-processing there is no MMInputRef; the core processes the input:
    data: bytes = b""  # as its sender encoded it
    count: int = 1  # inputs of this kind in the prompt
    options: dict[str, Any] = {}


class AddRequest(msgspec.Struct, array_like=True, frozen=True, tag=0, gc=False):
    handle: int
    prompt: bytes  # int32[tokens]
    max_tokens: int  # output tokens; the front end has reduced it to max_model_len - prompt
    sampling: Sampling
    stop_ids: tuple[int, ...] = ()  # end-of-sequence ids included, unless ignored
    min_tokens: int = 0
    priority: int = 0  # lower is sooner; only used with --scheduling-policy priority
    cache_salt: str = ""  # prompts share cached blocks only under the same salt
    adapter: str = ""
    # For a core with an inline front end, which tokenizes `text` and detokenizes the output:
    text: str = ""
    add_special_tokens: bool = True
    text_options: TextOptions | None = None
    mm_inputs: tuple[MMInputRef, ...] = ()  # by offset
    unplaced: tuple[UnplacedInput, ...] = ()  # of a prompt in which the core replaces the placeholders
    grammar: Grammar | None = None
    second_segment: int = 0  # pooling of a pair of texts: position of the first token of type 1; 0: there is none
    reasoning: ReasoningBudget | None = None  # excludes a grammar
    remote_prefill: bool = False  # blocks of the prompt that are missing may be requested with a PrefillWanted
    push: KVPush | None = None  # only the blocks of the prompt are wanted, and sent there


class Abort(msgspec.Struct, array_like=True, frozen=True, tag=1, gc=False):
    handles: tuple[int, ...]


class Utility(msgspec.Struct, array_like=True, frozen=True, tag=2, gc=False):
    """A call that isn't about one request, e.g. `reset_prefix_cache`; answered by a UtilityResult."""

    front_end: int
    call: int
    method: str
    arguments: dict[str, Any] = {}


class FreeFeatures(msgspec.Struct, array_like=True, frozen=True, tag=4, gc=False):
    """A front end has evicted inputs from its feature cache: the core frees theirs once no request needs them."""

    sender: int  # the handle of the front end's first request: its successor, if it ends, has a higher one
    hashes: tuple[bytes, ...]


class Shutdown(msgspec.Struct, array_like=True, frozen=True, tag=3, gc=False):
    """Finish running requests for at most `drain_s` seconds, abort the rest, then end."""

    drain_s: float = 0.0


ToCore = AddRequest | Abort | Utility | Shutdown | FreeFeatures | PrefillEnded


# ---------------------------------------------------------------------------------------------- EngineCore -> front end


class MemoryLine(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One line of the memory table: purpose, bytes, and the flag that changes it."""

    what: str
    bytes: int
    flag: str = ""


class Ready(msgspec.Struct, array_like=True, frozen=True, tag=10, gc=False):
    """The EngineCore is up: what the front end needs and the start table shows."""

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
    seconds: tuple[tuple[str, float], ...] = ()  # of each phase of the start
    scheduling_policy: str = "fcfs"
    ablations: tuple[str, ...] = ()  # of engine.config.ABLATIONS
    scheduler_steps: int = 1
    kernels: str = ""  # what computes the model, in words
    kv_windows: tuple[int, ...] = (0,)  # of each KV group; 0: full attention
    sequences: int = 0  # requests of max-model-len that slots and blocks hold
    tile_table: str = ""  # the file with measured tiles of attention, if one is used
    quantization: str | None = None  # of the linears' weights; None: as dtype
    kv_cache_dtype: str | None = None  # None: as dtype
    mm: MMSpec | None = None  # None: the model takes texts only
    pooling: PoolingSpec | None = None  # None: the model generates
    simulated: str = ""  # the hardware that is simulated, in words; empty: the device is real
    budget_source: str = ""  # where max_num_batched_tokens comes from, in words; empty: it was given
    role: str = ""  # see engine.disaggregation
    kv_address: str = ""  # where a decode replica receives the blocks of prompts
    kv_layout: str = ""  # of the blocks of a replica with a role; those of others must have the same
    spilled_blocks: tuple[int, int] = (0, 0)  # that host memory and files have room for (--kv-spill)

    @property
    def prompt_vocab_size(self) -> int:
        """The ids that a prompt may have are below it."""
        return self.vocab_size + (0 if self.mm is None else self.mm.extra_tokens)

    @property
    def inline(self) -> bool:
        """Whether the core tokenizes and detokenizes."""
        return "inline-frontend" in self.ablations

    @property
    def processes_inline(self) -> bool:
        """Whether the core decodes and processes multimodal inputs."""
        return "inline-processing" in self.ablations


class Finished(msgspec.Struct, array_like=True, frozen=True, gc=False):
    handle: int
    reason: int  # FinishReason
    stop_id: int = -1  # the stop token that ended it, if any
    error: str = ""  # the cause, for the user, unless it ended as it should
    preemptions: int = 0
    stop: str = ""  # inline front end: the stop string that ended it
    text: str = ""  # inline front end: text that was held back until the end
    preempted: tuple[tuple[float, float], ...] = ()  # when it lost its slot, and when it got one again


class Admitted(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request was given a slot for the first time."""

    handle: int
    cached_tokens: int  # prompt tokens found in the prefix cache
    waited_s: float
    prompt_tokens: int = 0  # with an inline front end or multimodal inputs only


class Outputs(msgspec.Struct, array_like=True, frozen=True, tag=11, gc=False):
    """What happened to the requests of one front end."""

    at: float  # the core's clock when the tokens were booked
    handles: bytes = b""  # int64[n]: requests with new tokens
    tokens: bytes = b""  # int32[sum of counts]
    counts: bytes = b""  # int32[n]; empty: one token each
    finished: tuple[Finished, ...] = ()
    admitted: tuple[Admitted, ...] = ()
    logprobs: TokenLogprobs | None = None
    stats: Stats | None = None
    texts: tuple[str, ...] | None = None  # inline front end: one for each handle
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()  # complete with a request's first token at the latest
    pooled: tuple[Pooled, ...] = ()
    prefills: tuple[PrefillWanted, ...] = ()


class UtilityResult(msgspec.Struct, array_like=True, frozen=True, tag=12, gc=False):
    call: int
    result: Any = None
    error: str = ""


class Dead(msgspec.Struct, array_like=True, frozen=True, tag=13, gc=False):
    """The EngineCore has failed."""

    cause: str


class Hung(msgspec.Struct, array_like=True, frozen=True, tag=14, gc=False):
    """A step exceeds --step-timeout; with an empty cause: it has returned."""

    cause: str = ""


FromCore = Ready | Outputs | UtilityResult | Dead | Hung


# ------------------------------------------------------------------------------------------------ EngineCore -> workers


class SlotAssignment(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A request is given a slot. The scheduler numbers slots; a slot's generation grows with each new request."""

    slot: int
    generation: int
    tokens: bytes  # int32: all known tokens; after a preemption output tokens follow the prompt
    num_prompt_tokens: int
    num_computed_tokens: int  # tokens whose KV is in the blocks already (prefix hit)
    block_tables: tuple[bytes, ...]  # int32, of each KV group; 0 where a window has left a block
    sampling: Sampling
    adapter: str = ""
    mm_inputs: tuple[MMInputRef, ...] = ()  # `hash` is the key in the encoder cache
    constrained: bool = False  # it samples with a mask
    second_segment: int = 0  # see AddRequest


class StepMessage(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What changed since the last step. A worker applies freed_slots, assigned_slots, new_blocks, then runs the step.

    Every live slot that is not in `chunks` computes one token, at position `num_computed_tokens`. A slot samples in
    this step if all its tokens are computed then. Results are in ascending order of slots.

    A burst is one message for `num_steps` steps, numbered from `step` on, each with its own result. Slots that are idle
    in the first are idle in all; the others compute one token in each.
    """

    step: int
    freed_slots: bytes = b""  # int32[n]
    assigned_slots: tuple[SlotAssignment, ...] = ()
    new_blocks: bytes | tuple[int, bytes] = b""  # int32[n, 3], see `unpack_new_blocks`; or n, and that packed
    chunks: bytes = b""  # int32[n, 2]: slot, tokens to compute; 0: the slot is idle
    num_steps: int = 1
    free_encoder_keys: tuple[bytes, ...] = ()  # embeddings to free before any are encoded
    encoder_inputs: tuple[tuple[int, int], ...] = ()  # slot, number of its input: encoded before the forward pass

    def unpack_new_blocks(self) -> Int32s:
        """Slot, KV group and block, [n, 3]: blocks to append to the block tables, in this order."""
        if isinstance(self.new_blocks, bytes):
            return int32s(self.new_blocks, 3)
        count, packed = self.new_blocks
        return unpack_table(packed, count, 3)

    def later_steps(self) -> "list[StepMessage]":
        """The steps of a burst after the first, as separate messages."""
        return [StepMessage(step=self.step + later, chunks=self.chunks) for later in range(1, self.num_steps)]


COPY_IN, COPY_OUT = 0, 1


class CopyingStep(StepMessage, array_like=True, frozen=True, gc=False):
    """A step that copies KV blocks to or from host blocks first. All others are sent as StepMessage, without a field.

    `block_copies`: int32[n, 3], executed in order before the forward pass: COPY_OUT of the KV cache or COPY_IN, block
    of the KV cache, host block.
    """

    block_copies: bytes = b""


class StepReports(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """What else the core must know about a step."""

    rejected: bytes = b""  # int32[n, 2]: slots whose adapter the worker does not have, and their generations
    encoded: tuple[str, ...] = ()  # of each of its `encoder_inputs`, why it could not be encoded; empty: it was


class StepResult(msgspec.Struct, array_like=True, frozen=True, gc=False):
    step: int
    tokens: bytes  # int32: sampled tokens, ascending slots
    counts: bytes = b""  # int32: tokens of each slot that sampled; empty: one each
    logprobs: TokenLogprobs | None = None
    seconds: float = 0.0  # device time of the step
    num_draft_tokens: int = 0  # draft tokens that were verified; the accepted ones are in `tokens`
    reports: StepReports | None = None
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    vectors: bytes = b""  # float32[n, width]: of slots that pool, in place of tokens; ascending slots


_encoder = msgspec.msgpack.Encoder()


def encode(message: ToCore | FromCore | StepMessage | StepResult) -> bytes:
    return _encoder.encode(message)


decode_to_core: Callable[[bytes], ToCore] = msgspec.msgpack.Decoder(ToCore).decode
decode_from_core: Callable[[bytes], FromCore] = msgspec.msgpack.Decoder(FromCore).decode
decode_step: Callable[[bytes], StepMessage] = msgspec.msgpack.Decoder(StepMessage).decode
decode_copying_step: Callable[[bytes], CopyingStep] = msgspec.msgpack.Decoder(CopyingStep).decode  # reads both
decode_result: Callable[[bytes], StepResult] = msgspec.msgpack.Decoder(StepResult).decode
