"""Requests of a model that pools: their messages, their vectors, and the embeddings made of these."""

import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from engine.arrays import Float32s
from engine.columns import column, float32s
from engine.errors import EngineDeadError, RequestError
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import RequestOptions, RequestStream
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.truncation import encode_end, truncate
from engine.messages import AddRequest, Sampling
from engine.pooling import PoolingSpec

POOLING = SamplingParams(max_tokens=1, temperature=0)  # of all streams: the core counts the vector as one token
SMALLEST_LENGTH = 1e-12  # of a vector that is normalized, as in PyTorch


def make_pooling_request(handle: int, prompt: list[int], second_segment: int, options: RequestOptions) -> AddRequest:
    """Build the core's message for one prompt.

    Args:
        handle: of the request.
        prompt: token ids.
        second_segment: position of the first token of type 1; 0: there is none.
        options: what else the core needs to know.
    """
    extra = msgspec.structs.asdict(options)
    return AddRequest(handle, column(prompt), 1, Sampling(), second_segment=second_segment, **extra)


async def collect_vectors(stream: RequestStream) -> list[Float32s]:
    """Read a stream to its end; the vectors are in the order of its prompts.

    Raises EngineDeadError if the server shuts down before all are there.
    """
    async for _ in stream:
        pass  # deltas have no tokens
    if len(stream.vectors) < len(stream.prompts):
        raise EngineDeadError("the server shut down before all vectors were computed")
    return [float32s(stream.vectors[index]) for index in range(len(stream.prompts))]


def check_dimensions(dimensions: int | None, spec: PoolingSpec) -> None:
    """Raise RequestError for a number of dimensions that embeddings of the model can't have."""
    if dimensions is None or dimensions == spec.width:
        return
    if not spec.matryoshka:
        raise RequestError(
            f"dimensions: embeddings of this model have {spec.width} numbers, and it is not a matryoshka model, whose "
            "embeddings may be cut: leave dimensions out",
            "dimensions",
        )
    if not 1 <= dimensions <= spec.width or (spec.dimensions and dimensions not in spec.dimensions):
        allowed = ", ".join(map(str, spec.dimensions)) if spec.dimensions else f"1..{spec.width}"
        raise RequestError(f"dimensions must be one of {allowed}, not {dimensions}", "dimensions")


def embedding_of(vector: Float32s, dimensions: int | None, *, normalize: bool) -> Float32s:
    """The embedding of a pooled vector: its first `dimensions` numbers, divided by their length."""
    first = vector if dimensions is None else vector[:dimensions]
    if not normalize:
        return first
    length: np.float32 = np.sqrt(np.square(first).sum(dtype=np.float32))
    return first / np.maximum(length, np.float32(SMALLEST_LENGTH))


def score_of(vector: Float32s, spec: PoolingSpec, *, activate: bool = True) -> float:
    """The score of a vector of one number; without `activate`, the number itself."""
    logit = float(vector[0])
    if spec.activation == "none" or not activate:
        return logit
    # exp of a large number overflows
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def cosines(pairs: Sequence[tuple[str, str]], made: Mapping[str, Float32s]) -> list[float]:
    """The cosine of the two embeddings of each pair. `made` has the vector of each text."""
    unit = {text: embedding_of(vector, None, normalize=True) for text, vector in made.items()}
    return [float(np.dot(unit[first], unit[second])) for first, second in pairs]


def special_frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind each text."""
    bare, framed = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    last = len(framed) - len(bare)
    begin = next((at for at in range(last + 1) if framed[at : at + len(bare)] == bare), None)
    return ([], []) if begin is None else (framed[:begin], framed[begin + len(bare) :])


def encode_truncated(
    tokenizer: Tokenizer, text: str, keep: int, side: str | None, add_special_tokens: bool
) -> list[int]:
    """Token ids of a text of which at most `keep` are left, its special tokens always among them.

    The beginning of the text is kept; with side "left" its end. Raises RequestError if there is room for special tokens
    only.
    """
    side = side or "right"
    bare, _ = encode_end(tokenizer, text, keep, side, False)
    before, behind = special_frame(tokenizer) if add_special_tokens else ([], [])
    room = keep - len(before) - len(behind)
    if room < 1:
        raise RequestError(
            f"truncate_prompt_tokens {keep} leaves no token for the text: the model adds {keep - room} special tokens",
            "truncate_prompt_tokens",
        )
    return [*before, *truncate(bare, room, side, ()), *behind]


def encode_texts(
    tokenizer: Tokenizer,
    spec: PoolingSpec,
    given: Sequence[str | list[int]],
    max_model_len: int,
    *,
    keep: int | None = None,
    side: str | None = None,
    add_special_tokens: bool = True,
) -> list[list[int]]:
    """The prompts of texts or token ids.

    Args:
        tokenizer, spec: of the model.
        given: texts, or lists of token ids, which get no special tokens.
        max_model_len: of the model, the most tokens of a prompt.
        keep: how many tokens of each are kept, special tokens included; None: all.
        side: "left" keeps the end of each instead of its beginning.
        add_special_tokens: put those of the tokenizer around each text.

    Raises RequestError for a text that is much too long, or of which nothing would be left.
    """

    def encode(one: str | list[int]) -> list[int]:
        if isinstance(one, list):
            return one if keep is None else one[-keep:] if side == "left" else one[:keep]
        text = one.lower() if spec.lowercase else one
        if keep is None:
            return tokenizer.encode_prompt(text, add_special_tokens, max_model_len)
        return encode_truncated(tokenizer, text, keep, side, add_special_tokens)

    return list(map(encode, given))
