"""How long a step takes on named hardware, from what it computes."""

import math
from bisect import bisect_left
from dataclasses import dataclass, field

from engine.errors import ConfigError
from engine.hardware.description import AllReduce, Hardware
from engine.hardware.gemm import products_of
from engine.hardware.towers import TowerShape, TowerTime

LOGIT_PASSES = 4  # over float32 logits: written once, read by the sampler three times


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What the time of a step depends on; of the whole model."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    gemm_dtype: str = "bf16"  # of the layers' products; the head's are bf16
    kv_dtype: str = "bf16"

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * (2 if self.kv_dtype == "bf16" else 1)


@dataclass(slots=True)
class StepWork:
    """What a step computes.

    decodes: requests with one token. context: tokens that all of these attend to. chunks: of each other request, its
    tokens and the tokens before them. sampled: requests that get a token. images: those that are encoded, as numbers
    of their tokens in the prompt.
    """

    decodes: int = 0
    context: int = 0
    chunks: list[tuple[int, int]] = field(default_factory=list)
    sampled: int = 0
    images: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.decodes + sum(count for count, _ in self.chunks)


class StepTime:
    """Times of the steps of a model on some ranks of a device. Raises ConfigError if they can't hold it."""

    def __init__(self, hardware: Hardware, shape: DecoderShape, ranks: int = 1, tower: TowerShape | None = None):
        check_ranks(hardware, shape, ranks)
        self._tower = TowerTime(hardware, tower) if tower is not None else None
        self._hardware, self._shape, self._ranks = hardware, shape, ranks
        self._products = products_of(hardware, shape.gemm_dtype)
        self._head_products = products_of(hardware, "bf16")
        attention = getattr(hardware.attention.decode, shape.kv_dtype)
        self._attention_launch, self._request_seconds = attention.launch_us * 1e-6, attention.request_us * 1e-6
        kv_heads = max(shape.num_kv_heads // ranks, 1)
        self._kv_seconds = shape.kv_bytes * kv_heads / shape.num_kv_heads / (attention.memory * hardware.bandwidth)
        peak = hardware.peak_tflops.bf16 * 1e12
        operations = 4 * shape.num_heads / ranks * shape.head_dim
        self._score_seconds = operations / (hardware.attention.prompt * peak)
        if attention.compute is not None:
            self._kv_seconds += operations / (attention.compute * peak)
        self._by_tokens: dict[int, float] = {}
        self._by_sampled: dict[int, float] = {}

    def seconds(self, work: StepWork) -> float:
        """Of the device: the images, all layers and the head."""
        if work.images:
            assert self._tower is not None, "a step encodes images for a model without a tower"
            return sum(map(self._tower.seconds, work.images)) + self._decoder(work)
        return self._decoder(work)

    def _decoder(self, work: StepWork) -> float:
        tokens = work.tokens
        if not tokens:
            return 0.0
        attention = self._attention_launch + work.context * self._kv_seconds + work.decodes * self._request_seconds
        for count, before in work.chunks:
            attention += self._score_seconds * count * (before + count / 2)
        layers = self._shape.num_layers
        seconds = layers * (self._layer(tokens) + attention) + self._head(work.sampled)
        if tokens > self._hardware.layer.captured_tokens:
            return max(seconds, layers * self._hardware.layer.eager_us * 1e-6)
        return seconds

    def _layer(self, tokens: int) -> float:
        """A layer without its attention."""
        if (known := self._by_tokens.get(tokens)) is not None:
            return known
        shape, ranks, hardware = self._shape, self._ranks, self._hardware
        seconds = sum(self._products.seconds(tokens, k, n) for k, n in layer_products(shape, ranks))
        seconds += hardware.layer.small_kernels_us * 1e-6
        elements = tokens * layer_elements(shape, ranks)
        seconds += 2 * elements / (hardware.layer.small_kernels_memory * hardware.bandwidth)
        seconds += 2 * all_reduce_seconds(hardware.all_reduce, ranks, tokens * shape.hidden_size)
        self._by_tokens[tokens] = seconds
        return seconds

    def _head(self, sampled: int) -> float:
        """The product that makes logits, and the choice of tokens."""
        if not sampled:
            return 0.0
        if (known := self._by_sampled.get(sampled)) is not None:
            return known
        hidden, vocabulary = self._shape.hidden_size, -(-self._shape.vocab_size // self._ranks)
        seconds = self._head_products.seconds(sampled, hidden, vocabulary)
        seconds += (
            LOGIT_PASSES
            * 4
            * sampled
            * vocabulary
            / (self._hardware.layer.small_kernels_memory * self._hardware.bandwidth)
        )
        self._by_sampled[sampled] = seconds
        return seconds


def layer_products(shape: DecoderShape, ranks: int = 1) -> tuple[tuple[int, int], ...]:
    """Rows and columns of the weights of a layer's products on one rank: QKV, output, gate and up, down."""
    hidden, inner = shape.hidden_size, shape.intermediate_size // ranks
    query, key_value = _heads(shape, ranks)
    return (hidden, query + 2 * key_value), (query, hidden), (hidden, 2 * inner), (inner, hidden)


def layer_weights(shape: DecoderShape) -> int:
    """Weights of the products of a layer, on all ranks."""
    return sum(k * n for k, n in layer_products(shape))


def layer_elements(shape: DecoderShape, ranks: int = 1) -> int:
    """Activations of a token that the small kernels of a layer read or write on one rank."""
    query, key_value = _heads(shape, ranks)
    return 8 * shape.hidden_size + 3 * (shape.intermediate_size // ranks) + 3 * (query + 2 * key_value)


def _heads(shape: DecoderShape, ranks: int) -> tuple[int, int]:
    """Elements of a token's queries and of its keys on one rank, which has at least one head of keys."""
    return shape.num_heads * shape.head_dim // ranks, max(shape.num_kv_heads // ranks, 1) * shape.head_dim


def all_reduce_seconds(table: AllReduce, ranks: int, elements: int) -> float:
    """Interpolated in the logarithms of size and time; below the table its least time, above at its last bandwidth."""
    if ranks == 1:
        return 0.0
    sizes, times = table.elements, table.ranks[ranks]
    at = bisect_left(sizes, elements)
    if at == 0:
        return times[0] * 1e-6
    if at == len(sizes):
        return times[-1] * elements / sizes[-1] * 1e-6
    part = math.log(elements / sizes[at - 1]) / math.log(sizes[at] / sizes[at - 1])
    return times[at - 1] * (times[at] / times[at - 1]) ** part * 1e-6


def check_ranks(hardware: Hardware, shape: DecoderShape, ranks: int) -> None:
    """Raise ConfigError if the model or the tables don't have this number of ranks; the message has those that work."""
    if ranks == 1:
        return
    fits = [1, *(one for one in sorted(hardware.all_reduce.ranks) if shape.num_heads % one == 0)]
    if ranks not in fits:
        raise ConfigError(
            f"--tp {ranks} is not possible: {shape.num_heads} heads on {hardware.title} can be divided over "
            f"{', '.join(map(str, fits))} ranks"
        )
