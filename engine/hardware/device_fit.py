"""Fits the constants of a hardware description to measured steps of decoders of several shapes.

The time of a step is a sum of terms, each linear in one constant (see `engine.hardware.step_time`), so that the fit is
one problem of least squares in relative errors, with constants that are not negative:

    products     of every weight, by the number of rows: the increments between the rows of the table
    layer        of every layer, and of every activation that its small kernels pass through
    attention    of decodes: of every request, of every byte of keys and values, of every operation; of prompts: of
                 every operation
    step         of every step; it is the host's, since the device's time of a description has none
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.hardware.description import Attention, DecodeAttention, DecodeAttentions, Gemms, GemmTable, Layer
from engine.hardware.least_squares import Floats, nonnegative_least_squares
from engine.hardware.step_time import LOGIT_PASSES, DecoderShape, StepWork, layer_elements, layer_weights

SOURCE = "profile"  # the key of the source of all that is measured
CACHE_MEMORY = 4.0  # activations in caches pass at most at this multiple of the memory's bandwidth
LAYER, ELEMENTS, REQUEST, KV_BYTES, DECODE_OPERATIONS, PROMPT_OPERATIONS, STEP = range(-7, 0)  # columns


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What a step of a decoder computed, and how long it took."""

    shape: DecoderShape
    work: StepWork
    seconds: float


@dataclass(frozen=True, slots=True)
class DeviceFit:
    """The device's part of a description. error: the median of the relative errors of the steps it was fitted to."""

    bandwidth: float  # bytes a second
    peak: float  # operations a second
    gemm: Gemms
    attention: Attention
    layer: Layer
    step_s: float
    error: float


def fit_device(steps: Sequence[MeasuredStep], rows: Sequence[int]) -> DeviceFit:
    """Raises ValueError for no steps.

    Args:
        steps: of two or more shapes and numbers of layers; without these some terms can't be told apart.
        rows: of the table of products, ascending.
    """
    if not steps:
        raise ValueError("no steps to fit to")
    matrix = np.array([step_terms(step, rows) for step in steps])
    measured = np.array([step.seconds for step in steps])
    bandwidth, peak = (max(values) for values in zip(*map(_reached, steps), strict=True))
    # No part can be faster than this; what is left is fitted.
    least = np.zeros(matrix.shape[1])
    least[ELEMENTS], least[KV_BYTES], least[PROMPT_OPERATIONS] = 1 / (CACHE_MEMORY * bandwidth), 1 / bandwidth, 1 / peak
    relative = matrix / measured[:, None]
    found = least + nonnegative_least_squares(relative, 1 - relative @ least)
    each = np.maximum(np.cumsum(found[: len(rows)]), 1e-15)
    error = float(np.median(np.abs(matrix @ found / measured - 1)))
    constants: list[float] = found.tolist()
    bandwidth, peak = max(bandwidth, 2 / float(each[0])), max(peak, float((2 * np.array(rows) / each).max()))
    return DeviceFit(
        bandwidth=bandwidth,
        peak=peak,
        gemm=Gemms(SOURCE, bf16_table=GemmTable(tuple(rows), tuple((each * 1e12).tolist()))),
        attention=Attention(
            SOURCE, DecodeAttentions(_decode(constants, bandwidth, peak)), _part(constants[PROMPT_OPERATIONS], peak)
        ),
        layer=Layer(
            SOURCE, small_kernels_us=constants[LAYER] * 1e6,
            small_kernels_memory=1 / (constants[ELEMENTS] * bandwidth),
            eager_us=0, captured_tokens=0,
        ),
        step_s=constants[STEP],
        error=error,
    )  # fmt: skip


def _decode(found: Sequence[float], bandwidth: float, peak: float) -> DecodeAttention:
    operations = found[DECODE_OPERATIONS]
    return DecodeAttention(
        launch_us=0,
        memory=_part(found[KV_BYTES], bandwidth),
        compute=1 / (operations * peak) if operations > 0 else None,
        request_us=found[REQUEST] * 1e6,
    )


def _part(seconds: float, rate: float) -> float:
    """The part of a rate that is reached if a unit takes so many seconds."""
    return min(1 / (seconds * rate), 1.0)


def _reached(step: MeasuredStep) -> tuple[float, float]:
    """Bytes of weights and operations of products a second: lower bounds of bandwidth and peak."""
    shape, work = step.shape, step.work
    layers, head = shape.num_layers * layer_weights(shape), shape.vocab_size * shape.hidden_size
    operations = 2 * (work.tokens * layers + work.sampled * head)
    return 2 * (layers + head * (work.sampled > 0)) / step.seconds, operations / step.seconds


def step_terms(step: MeasuredStep, rows: Sequence[int]) -> Floats:
    """What each constant is multiplied with in the time of a step."""
    shape, work, layers = step.shape, step.work, step.shape.num_layers
    tokens, query = work.tokens, shape.num_heads * shape.head_dim
    products = layers * layer_weights(shape) * _increments(tokens, rows)
    products += shape.vocab_size * shape.hidden_size * _increments(work.sampled, rows)
    rest = np.zeros(7)
    rest[LAYER] = layers
    rest[ELEMENTS] = 2 * layers * tokens * layer_elements(shape) + 4 * LOGIT_PASSES * work.sampled * shape.vocab_size
    rest[REQUEST] = layers * work.decodes
    rest[KV_BYTES] = layers * work.context * shape.kv_bytes
    rest[DECODE_OPERATIONS] = layers * work.context * 4 * query
    rest[PROMPT_OPERATIONS] = layers * 4 * query * sum(count * (before + count / 2) for count, before in work.chunks)
    rest[STEP] = 1
    return np.concatenate((products, rest))


def _increments(count: int, rows: Sequence[int]) -> Floats:
    """How much of each increment a product with `count` rows takes, interpolated as `MeasuredProducts` does."""
    if count == 0:
        return np.zeros(len(rows))
    if count >= rows[-1]:
        return np.full(len(rows), count / rows[-1])
    weights = [1.0]
    for low, high in itertools.pairwise(rows):
        weights.append(min(max((count - low) / (high - low), 0.0), 1.0))
    return np.array(weights)
