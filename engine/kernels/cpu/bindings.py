"""ctypes bindings of the C++ kernels: mirrors kernels.cpp, and the structures of spec.h and its includes."""

import ctypes
import functools
import weakref
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.arrays import Float32s, Float64s, Int32s
from engine.grammar import RowMasks
from engine.kernels.cpu import build

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ADAPTED = ("qkv", "output", "gate_up", "down")  # linears of a layer that an adapter may add to
OPS = ("embed", "norm", "qkv", "rotary", "attention", "encode", "output", "gate_up", "down", "head")


class Linear(Structure):
    _fields_ = (
        ("panels", c_void_p), ("scales", c_void_p), ("bias", c_void_p), ("outputs", c_int32), ("inputs", c_int32),
    )  # fmt: skip


class Layer(Structure):
    _fields_ = (
        ("qkv", Linear), ("output", Linear), ("gate_up", Linear), ("down", Linear), ("input_norm", c_void_p),
        ("post_norm", c_void_p), ("query_norm", c_void_p), ("key_norm", c_void_p), ("keys", c_void_p),
        ("values", c_void_p), ("window", c_int32), ("group", c_int32), ("rotary", c_int32),
    )  # fmt: skip


class StackSpec(Structure):
    _fields_ = (
        ("hidden", c_int32), ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32),
        ("intermediate", c_int32), ("layers", c_int32), ("vocabulary", c_int32), ("block_size", c_int32),
        ("partial", c_int32), ("first_token", c_int32), ("embedded", c_int32), ("epsilon", c_float),
        ("scaling", c_float), ("rotary_scaling", c_float), ("frequencies", c_void_p), ("axes", POINTER(c_int32)),
        ("embedding", c_void_p), ("final_norm", c_void_p), ("layer", POINTER(Layer)), ("head", Linear),
    )  # fmt: skip


class PackedLowRank(Structure):
    _fields_ = (("down", c_void_p), ("up", c_void_p), ("rank", c_int32))


class _Adapters(Structure):
    _fields_ = (("table", c_void_p), ("of_token", c_void_p), ("max_rank", c_int32))


class _Ragged(Structure):
    _fields_ = (
        ("rows", c_int32), ("tokens", c_int32), ("starts", c_void_p), ("counts", c_void_p), ("computed", c_void_p),
        ("tables", c_void_p), ("table_width", c_int32),
    )  # fmt: skip


class _Step(Structure):
    _fields_ = (
        ("batch", _Ragged), ("ids", c_void_p), ("positions", c_void_p), ("rotary", c_void_p), ("row_of", c_void_p),
        ("sampled", c_void_p), ("samples", c_int32), ("adapters", _Adapters),
    )  # fmt: skip


class _Masks(Structure):
    _fields_ = (("words", c_void_p), ("of", c_void_p), ("stride", c_int32))


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """A packed adapter."""

    linears: ctypes.Array[PackedLowRank]  # [layers * ADAPTED]
    max_rank: int
    owners: Any  # the arrays that `linears` point to


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one step, laid end to end as in `engine.worker.slots.StepBatch`; all int32, contiguous.

    starts, counts, computed: [rows]; tables: [KV groups, rows, blocks]; ids, positions, row_of: [tokens];
    sampled: [samples]; rotary: [axes, tokens], the rotary positions, of which models without M-RoPE have one a token.
    """

    starts: Int32s
    counts: Int32s
    computed: Int32s
    tables: Int32s
    ids: Int32s
    positions: Int32s
    row_of: Int32s
    sampled: Int32s
    rotary: Int32s

    @classmethod
    def of(cls, *columns: Any, rotary: Any = None) -> "Batch":
        """Make a batch from integer arrays of any type, in the order of the fields; rotary: None: the positions."""
        each = [np.ascontiguousarray(column, dtype=np.int32) for column in columns]
        each.append(each[5][None] if rotary is None else np.ascontiguousarray(rotary, dtype=np.int32))
        return cls(*each)

    def step(self) -> _Step:
        ragged = _Ragged(
            len(self.starts), len(self.ids), self.starts.ctypes.data, self.counts.ctypes.data,
            self.computed.ctypes.data, self.tables.ctypes.data, self.tables.shape[2],
        )  # fmt: skip
        return _Step(
            ragged, self.ids.ctypes.data, self.positions.ctypes.data, self.rotary.ctypes.data,
            self.row_of.ctypes.data, self.sampled.ctypes.data, len(self.sampled),
        )  # fmt: skip


def load(isa: str, weights: str, cache: str) -> ctypes.CDLL:
    """The kernels of an instruction set of build.ISAS, compiled if needed, in a process that may use it.

    They have the stack of these formats (see FORMATS), others perhaps. Raises BuildError.
    """
    build.request_permission(isa)
    return _open(build.library(isa, stack=(FORMATS[weights], FORMATS[cache])))


@functools.cache
def _open(path: Path) -> ctypes.CDLL:
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:  # e.g. a folder that is mounted noexec
        raise build.BuildError(f"the CPU kernels can't be loaded: {error}") from error
    functions.redline_stack.restype = c_void_p
    functions.redline_stack.argtypes = (POINTER(StackSpec), c_int, c_int, c_int, c_void_p)
    functions.redline_run.argtypes = (c_void_p, POINTER(_Step), c_int, c_int)
    functions.redline_logits.argtypes = (c_void_p, c_void_p, c_int, c_void_p)
    functions.redline_choose.argtypes = (c_void_p, c_int, c_void_p, c_void_p, POINTER(_Masks), c_void_p)
    functions.redline_greedy.argtypes = (c_void_p, c_int, c_void_p, POINTER(_Masks), c_void_p, c_void_p, c_void_p)
    functions.redline_draw.argtypes = (c_void_p, c_void_p, c_void_p)
    for view in (functions.redline_partial, functions.redline_hidden):
        view.argtypes, view.restype = (c_void_p,), POINTER(c_float)
    functions.redline_seconds.argtypes = (c_void_p, POINTER(c_double))
    functions.redline_free.argtypes = (c_void_p,)
    for name in ("run", "logits", "choose", "greedy", "draw", "seconds", "free"):
        getattr(functions, f"redline_{name}").restype = None
    return functions


class Stack:
    """A whole decoder in C++, with its weights, KV cache and threads.

    Args:
        weights, cache: formats, see FORMATS.
        isa: one of build.ISAS.
        owners: the arrays that `spec` points to. They are kept alive.
        cores: the core of each thread, the calling thread's first; empty: threads are not pinned.

    Raises BuildError, and ValueError if the kernels do not support these formats, or memory or threads are missing.
    """

    def __init__(
        self, spec: StackSpec, weights: str, cache: str, threads: int, isa: str, owners: Any, cores: Sequence[int] = ()
    ):
        self._functions = load(isa, weights, cache)
        self._owners = (spec, owners)
        self._spec = spec
        pinned = np.array(cores, dtype=np.int32)
        assert len(cores) in (0, threads)
        where = pinned.ctypes.data if len(cores) else None
        self._stack = self._functions.redline_stack(spec, FORMATS[weights], FORMATS[cache], threads, where)
        if self._stack is None:
            raise ValueError(
                f"the kernels do not support {weights} weights with a {cache} cache, or memory or threads are missing"
            )
        self._free = weakref.finalize(self, self._functions.redline_free, self._stack)
        self._free.atexit = False  # a thread may still run in it
        self._step: _Step | None = None
        self._batch: Batch | None = None
        self._adapters: Any = None  # arrays that the step points to
        self._masks: Any = None  # arrays that `draw` reads after `greedy`
        self._axes = max(spec.axes[: spec.head_dim // 2]) + 1
        self.last_part = 2 * spec.layers + 1

    def begin(self, batch: Batch, adapters: Sequence[PackedAdapter] = (), adapter_of: Int32s | None = None) -> None:
        """Begin a step. Its parts are run next, in order.

        Args:
            adapters: those that tokens of the batch use.
            adapter_of: int32[tokens], each token's index into `adapters`, -1 for none.

        Raises ValueError for an index beyond `adapters`, for an adapter that isn't packed for this model, and if rotary
        positions are missing.
        """
        if batch.rotary.shape[0] < self._axes:
            raise ValueError(f"tokens need {self._axes} rotary positions each (M-RoPE), not {batch.rotary.shape[0]}")
        highest = -1 if adapter_of is None else int(adapter_of.max())
        if highest >= len(adapters):
            raise ValueError(f"a token has adapter {highest} of {len(adapters)}")
        self._batch, self._step = batch, batch.step()
        self._adapters = None
        if adapter_of is not None and highest >= 0:
            self._begin_adapters(self._step, tuple(adapters), np.ascontiguousarray(adapter_of, dtype=np.int32))

    def _begin_adapters(self, step: _Step, adapters: tuple[PackedAdapter, ...], of_token: Int32s) -> None:
        count = self._spec.layers * len(ADAPTED)
        if len(of_token) != step.batch.tokens or any(len(one.linears) != count for one in adapters):
            raise ValueError(f"adapters of {len(of_token)} tokens, or of another model, for {step.batch.tokens} tokens")
        table = (c_void_p * len(adapters))(*(ctypes.addressof(one.linears) for one in adapters))
        self._adapters = (adapters, table, of_token)
        max_rank = max(one.max_rank for one in adapters)
        step.adapters = _Adapters(ctypes.addressof(table), of_token.ctypes.data, max_rank)

    def run(self, first: int, last: int) -> None:
        """Run parts of the step: 0 is the embedding, then attention and MLP of each layer, then the sampled tokens."""
        self._functions.redline_run(self._stack, self._step, first, last)

    def partial(self) -> Float32s:
        """This rank's share of the sum over ranks that the last part computed, [tokens, hidden]; a view."""
        return self._view(self._functions.redline_partial(self._stack))

    def hidden(self) -> Float32s:
        """The hidden states between two parts, [tokens, hidden]; a view. Several ranks have yet to add `partial`."""
        return self._view(self._functions.redline_hidden(self._stack))

    def _view(self, values: Any) -> Float32s:
        assert self._batch is not None
        return np.ctypeslib.as_array(values, (len(self._batch.ids), self._spec.hidden))

    def logits(self, which: Int32s, out: Float32s) -> None:
        """Write the logits of some of the batch's `sampled` tokens: out[len(which), vocabulary]."""
        self._functions.redline_logits(self._stack, which.ctypes.data, len(which), out.ctypes.data)

    def choose(self, temperatures: Float32s, uniforms: Float64s, masks: RowMasks | None = None) -> Int32s:
        """One token for each of the first n of the batch's `sampled` tokens. No logits are written.

        Args:
            temperatures: [n]; at 0 the greedy token is taken (the first of equals).
            uniforms: [n], numbers in [0, 1); with a temperature above 0 the token is drawn by this number.
            masks: the tokens that some of them may choose.
        """
        assert self._batch is not None
        samples = len(temperatures)
        assert temperatures.shape == uniforms.shape
        assert samples <= len(self._batch.sampled)
        out = np.empty(samples, dtype=np.int32)
        given = np.ascontiguousarray(temperatures, np.float32), np.ascontiguousarray(uniforms, np.float64)
        pointers = (column.ctypes.data for column in given)
        self._functions.redline_choose(
            self._stack, samples, *pointers, self._use_masks(masks, samples), out.ctypes.data
        )
        return out

    def greedy(self, temperatures: Float32s, masks: RowMasks | None = None) -> tuple[Float32s, Int32s, Float64s]:
        """For each of the first n samples, over this rank's tokens: highest logit, greedy token, sum of weights.

        The weight of a token is exp((logit - highest) / temperature); at temperature 0 no weights are computed.
        `masks`: of this rank's tokens, those that some samples may choose.
        """
        samples = len(temperatures)
        given = np.ascontiguousarray(temperatures, np.float32)
        top, token, weight = np.empty(samples, np.float32), np.empty(samples, np.int32), np.empty(samples, np.float64)
        pointers = (column.ctypes.data for column in (top, token, weight))
        self._functions.redline_greedy(
            self._stack, samples, given.ctypes.data, self._use_masks(masks, samples), *pointers
        )
        return top, token, weight

    def _use_masks(self, masks: RowMasks | None, samples: int) -> _Masks | None:
        """What the kernels read; null without masks."""
        if masks is None:
            self._masks = None
            return None
        words = masks.reaching(self._spec.vocabulary)
        of = np.full(samples, -1, dtype=np.int32)
        of[masks.at] = np.arange(len(words))
        self._masks = words, of
        return _Masks(words.ctypes.data, of.ctypes.data, words.shape[1])

    def draw(self, uniforms: Float64s) -> Int32s:
        """After `greedy`: draw one of this rank's tokens for each sample, by numbers in [0, 1)."""
        out = np.empty(len(uniforms), dtype=np.int32)
        given = np.ascontiguousarray(uniforms, np.float64)
        self._functions.redline_draw(self._stack, given.ctypes.data, out.ctypes.data)
        return out

    def seconds(self) -> dict[str, float]:
        """Seconds of each op since the last call."""
        found = (c_double * len(OPS))()
        self._functions.redline_seconds(self._stack, found)
        return dict(zip(OPS, found, strict=True))

    def close(self) -> None:
        """End its threads. It can't be used any more."""
        self._free()
        self._stack = None
