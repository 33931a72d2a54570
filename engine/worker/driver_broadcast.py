"""V0's communication between ranks (`--ablate driver-broadcast`): only rank 0 gets steps, and broadcasts all inputs.

Rank 0 is a `Driver`: it keeps the state of requests, builds the batch of each step and broadcasts it before computing
it. The other ranks are `Follower`s without state. A message goes over the ranks' group as V0's tensors did:

    int64[1]: bytes of the description │ description: name, dtype and shape of each column │ column │ column │ …

Each part is a broadcast. Those of the columns run concurrently. Followers block in the first one.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.arrays import Float32s, Float64s, Int64s
from engine.config import EngineConfig
from engine.errors import RedlineError
from engine.kernels.attention import Span
from engine.model.loading.meta_model import MetaModel
from engine.model.model_info import ModelInfo
from engine.model.sharding.tp_plan import TPPlan
from engine.resolved_config import ResolvedConfig
from engine.worker import prompt_logprobs
from engine.worker.adapter_manager import AdapterManager, AdapterSharding
from engine.worker.backend_builder import BuiltBackend
from engine.worker.gloo_group import NO_TIMEOUT, GlooGroup
from engine.worker.mm_rows import MMRows
from engine.worker.model_backend import ModelBackend
from engine.worker.rank_protocol import Call, PeerLostError
from engine.worker.runner import Runner, SamplingPlan, build_parts, build_slots
from engine.worker.slots import StepBatch, WorkerSlots

log = logging.getLogger("redline.worker")

_NONE: Int64s = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class BroadcastStep:
    """What the other ranks compute of a step.

    batch: without `slots` and `num_draft_tokens`, which only rank 0 needs.
    chosen: whether the model backend chooses tokens.
    drawn: temperatures and uniform numbers of its draws; None: all choices are greedy.
    logits_of: entries of `sampled_at` whose logits rank 0 needs.
    """

    batch: StepBatch
    chosen: bool
    drawn: tuple[Float32s, Float64s] | None
    logits_of: Int64s

    @classmethod
    def of(cls, batch: StepBatch, plan: SamplingPlan) -> "BroadcastStep":
        drawn = None
        if plan.temperatures is not None and plan.uniforms is not None and plan.temperatures.any():
            drawn = plan.temperatures, plan.uniforms
        inputs = dataclasses.replace(batch, slots=_NONE, num_draft_tokens=_NONE)
        return cls(inputs, plan.temperatures is not None, drawn, plan.logits_of)


BroadcastMessage = BroadcastStep | Call | None  # None ends the followers

# Element types of columns; any other is an error.
_DTYPES = {str(kind): np.dtype(kind) for kind in ("bool", "uint8", "int32", "int64", "uint64", "float32", "float64")}
_BATCH = tuple(field.name for field in dataclasses.fields(StepBatch) if field.name != "mm")


class _Description(msgspec.Struct, array_like=True):
    """A message without its columns, which follow as plain bytes in the order of `columns`.

    It contains nothing executable: the group's sockets can be reached by other programs of the machine.
    """

    call: Call | None = None
    step: int | None = None  # None without a call: the end
    chosen: bool = False
    mm_dtype: str = ""  # of the embeddings of multimodal inputs
    columns: list[tuple[str, str, tuple[int, ...]]] = []  # name, dtype, shape


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Description).decode


def _columns(step: BroadcastStep) -> dict[str, NDArray[Any]]:
    """A step's columns by name, without those that are None."""
    named = {name: getattr(step.batch, name) for name in _BATCH if name != "step"}
    temperatures, uniforms = step.drawn or (None, None)
    named |= {"temperatures": temperatures, "uniforms": uniforms, "logits_of": step.logits_of}
    if step.batch.mm is not None:
        named |= _mm_columns(step.batch.mm)
    return {name: np.ascontiguousarray(values) for name, values in named.items() if values is not None}


def _mm_columns(rows: MMRows) -> dict[str, NDArray[Any] | None]:
    """The embeddings of a step as columns; those of tensors have bytes, since numpy lacks bfloat16."""
    positions = [span.positions for span in rows.spans]
    return {
        "mm_at": rows.at,
        "mm_embeddings": rows.embeddings.contiguous().view(torch.uint8).numpy(),
        "mm_deepstack": None if rows.deepstack is None else rows.deepstack.contiguous().view(torch.uint8).numpy(),
        "span_rows": np.array([span.row for span in rows.spans], dtype=np.int64),
        "span_lengths": np.array(list(map(len, positions)), dtype=np.int64),
        "span_positions": np.concatenate([_NONE, *positions]),
    }


def _mm_rows(columns: dict[str, NDArray[Any]], dtype: str) -> MMRows:
    def tensor(name: str) -> Tensor:
        return torch.from_numpy(columns[name]).view(getattr(torch, dtype))

    positions = np.split(columns["span_positions"], np.cumsum(columns["span_lengths"])[:-1])
    rows = columns["span_rows"].tolist()
    return MMRows(
        columns["mm_at"],
        tensor("mm_embeddings"),
        tensor("mm_deepstack") if "mm_deepstack" in columns else None,
        tuple(Span(row, at) for row, at in zip(rows, positions[: len(rows)], strict=True)),
    )


def broadcast(group: GlooGroup, message: BroadcastMessage) -> None:
    """Send a message to all other ranks (rank 0 only)."""
    columns: dict[str, NDArray[Any]] = {}
    description = _Description()
    if isinstance(message, BroadcastStep):
        columns = _columns(message)
        kinds = [(name, values.dtype.name, values.shape) for name, values in columns.items()]
        mm = message.batch.mm
        mm_dtype = "" if mm is None else str(mm.embeddings.dtype).removeprefix("torch.")
        description = _Description(None, message.batch.step, message.chosen, mm_dtype, kinds)
    elif message is not None:
        description = _Description(call=message)
    head = bytearray(_encode(description))
    group.broadcast([torch.tensor([len(head)])])
    group.broadcast([torch.frombuffer(head, dtype=torch.uint8)])
    group.broadcast([torch.from_numpy(values.reshape(-1).view(np.uint8)) for values in columns.values() if values.size])


def receive(group: GlooGroup) -> BroadcastMessage:
    """Block until the next message of rank 0, without using the CPU (all other ranks)."""
    [size] = group.broadcast([torch.zeros(1, dtype=torch.int64)], NO_TIMEOUT)
    [head] = group.broadcast([torch.empty(int(size), dtype=torch.uint8)])
    description = _decode(head.numpy().data)
    columns = {name: np.empty(shape, _DTYPES[kind]) for name, kind, shape in description.columns}
    group.broadcast([torch.from_numpy(one.reshape(-1).view(np.uint8)) for one in columns.values() if one.size])
    if description.step is None:
        return description.call
    drawn = (columns["temperatures"], columns["uniforms"]) if "temperatures" in columns else None
    inputs = {name: columns.get(name) for name in _BATCH if name != "step"}
    mm = _mm_rows(columns, description.mm_dtype) if description.mm_dtype else None
    batch = StepBatch(description.step, **inputs, mm=mm)  # type: ignore[arg-type]
    return BroadcastStep(batch, description.chosen, drawn, columns["logits_of"])


class Driver(Runner):
    """Rank 0's runner. It broadcasts everything that the other ranks must do too."""

    def __init__(self, backend: ModelBackend, slots: WorkerSlots, sharding: AdapterSharding | None, group: GlooGroup):
        super().__init__(backend, slots, sharding)
        self._group = group

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        broadcast(self._group, Call(method, arguments))
        return super().call(method, arguments)

    def _are_from_logits(self, slots: Int64s) -> NDArray[np.bool_]:
        """Slots with a mask are: when a step is broadcast, its masks aren't known yet, and only this rank gets them."""
        return super()._are_from_logits(slots) | self._slots.constrained[slots]

    def _compute(self, batch: StepBatch, plan: SamplingPlan) -> None:
        broadcast(self._group, BroadcastStep.of(batch, plan))
        super()._compute(batch, plan)

    def close(self) -> None:
        if not self.waits_to_be_sampled:  # otherwise the others wait in the step, and end with this process
            broadcast(self._group, None)


class Follower:
    """Any other rank: its shard of the model, without the state of requests."""

    def __init__(self, backend: ModelBackend, sharding: AdapterSharding | None, group: GlooGroup):
        self._backend = backend
        self._calls = AdapterManager(backend, {"": -1}, sharding).calls
        self._group = group

    @torch.inference_mode()
    def follow(self) -> None:
        """Execute rank 0's messages until the end."""
        while (message := receive(self._group)) is not None:
            if isinstance(message, BroadcastStep):
                self._run(message)
            else:
                self._call(message)

    def _call(self, call: Call) -> None:
        """Errors are dropped: rank 0 fails in the same way and answers. The loss of another rank is raised."""
        try:
            self._calls[call.method](**call.arguments)
        except PeerLostError:
            raise
        except RedlineError:
            pass
        except Exception:
            log.exception("a call failed")

    def _run(self, step: BroadcastStep) -> None:
        self._backend.forward(step.batch)
        if step.chosen:
            samples = len(step.batch.sampled_at)
            drawn = (np.zeros(samples, np.float32), np.zeros(samples)) if step.drawn is None else step.drawn
            self._backend.choose(*drawn)
        if len(step.logits_of):
            self._backend.logits(step.logits_of)
        for which in prompt_logprobs.parts(step.batch):
            self._backend.logits(which)


def build_driven(
    config: EngineConfig,
    model_info: ModelInfo,
    resolved: ResolvedConfig,
    meta_model: MetaModel,
    tp_plan: TPPlan,
    group: GlooGroup,
) -> tuple[Driver | Follower, BuiltBackend]:
    """Like `build_runner`, for ranks of which the first drives the others."""
    built, sharding = build_parts(config, model_info, resolved, meta_model, tp_plan)
    if group.rank == 0:
        return Driver(built.backend, build_slots(resolved, model_info, meta_model), sharding, group), built
    return Follower(built.backend, sharding, group), built
