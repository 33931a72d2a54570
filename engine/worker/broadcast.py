"""V0's way between ranks (`--ablate driver-broadcast`): rank 0 alone hears of steps, and broadcasts all inputs.

Rank 0 is a `Driver`: it keeps the rows, builds each step's batch and tells it before it computes it. The other ranks
are `Follower`s without rows. What is told goes over the ranks' group as V0's tensors did, after what describes them:

    int64[1]: bytes of the next │ description: what it is, each column's name, dtype, shape │ column │ column │ …

Each is a broadcast; those of the columns are under way together. Followers wait for the first.
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from engine.config import EngineConfig, ResolvedConfig
from engine.errors import RedlineError
from engine.model.blank import Blank
from engine.model.facts import ModelFacts
from engine.model.split import Split
from engine.worker import prompt_logprobs
from engine.worker.adapters import Adapters, Share
from engine.worker.group import FOREVER, GlooGroup
from engine.worker.network import Built, Network
from engine.worker.runner import Choice, Runner, build_parts, build_slots
from engine.worker.sampler import Float64s
from engine.worker.slots import Int64s, StepBatch, WorkerSlots
from engine.worker.wire import Call, PeerLostError

log = logging.getLogger("redline.worker")

_NONE: Int64s = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Step:
    """What the other ranks compute of a step: no `rows` and `drafts` of its batch, which are rank 0's own.

    chosen: whether the network chooses tokens. drawn: temperatures and numbers; None: it takes the likeliest. at: the
    entries of `sampled_at` whose logits rank 0 needs.
    """

    batch: StepBatch
    chosen: bool
    drawn: tuple[NDArray[np.float32], Float64s] | None
    at: Int64s

    @classmethod
    def of(cls, batch: StepBatch, choice: Choice) -> "Step":
        drawn = None
        if choice.temperatures is not None and choice.numbers is not None and choice.temperatures.any():
            drawn = choice.temperatures, choice.numbers
        inputs = dataclasses.replace(batch, slots=_NONE, num_draft_tokens=_NONE)
        return cls(inputs, choice.temperatures is not None, drawn, choice.at)


Told = Step | Call | None  # None: the end

# Of the columns that are sent; others are an error.
_DTYPES = {str(kind): np.dtype(kind) for kind in ("bool", "uint8", "int32", "int64", "uint64", "float32", "float64")}
_BATCH = tuple(field.name for field in dataclasses.fields(StepBatch))


class _Description(msgspec.Struct, array_like=True):
    """What is told, without its columns: those follow as plain bytes, in the order of `columns`.

    Nothing in it is run or imported by who hears it: the ranks' group goes over sockets of the machine.
    """

    call: Call | None = None
    step: int | None = None  # None, and no call: the end
    chosen: bool = False
    columns: list[tuple[str, str, tuple[int, ...]]] = []  # name, dtype, shape


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Description).decode


def _columns(step: Step) -> dict[str, NDArray[Any]]:
    """A step's columns by name; one that is None is left out."""
    named = {name: getattr(step.batch, name) for name in _BATCH if name != "step"}
    temperatures, numbers = step.drawn or (None, None)
    named |= {"temperatures": temperatures, "numbers": numbers, "at": step.at}
    return {name: np.ascontiguousarray(values) for name, values in named.items() if values is not None}


def tell(group: GlooGroup, what: Told) -> None:
    """Have all other ranks hear it; of rank 0 alone."""
    columns: dict[str, NDArray[Any]] = {}
    description = _Description()
    if isinstance(what, Step):
        columns = _columns(what)
        kinds = [(name, values.dtype.name, values.shape) for name, values in columns.items()]
        description = _Description(step=what.batch.step, chosen=what.chosen, columns=kinds)
    elif what is not None:
        description = _Description(call=what)
    head = bytearray(_encode(description))
    group.broadcast([torch.tensor([len(head)])])
    group.broadcast([torch.frombuffer(head, dtype=torch.uint8)])
    group.broadcast([torch.from_numpy(values.reshape(-1).view(np.uint8)) for values in columns.values() if values.size])


def hear(group: GlooGroup) -> Told:
    """What rank 0 tells next, waited for without using the processor; of all other ranks."""
    [size] = group.broadcast([torch.zeros(1, dtype=torch.int64)], FOREVER)
    [head] = group.broadcast([torch.empty(int(size), dtype=torch.uint8)])
    told = _decode(head.numpy().data)
    columns = {name: np.empty(shape, _DTYPES[kind]) for name, kind, shape in told.columns}
    group.broadcast([torch.from_numpy(one.reshape(-1).view(np.uint8)) for one in columns.values() if one.size])
    if told.step is None:
        return told.call
    drawn = (columns["temperatures"], columns["numbers"]) if "temperatures" in columns else None
    batch = StepBatch(told.step, **{name: columns.get(name) for name in _BATCH if name != "step"})  # type: ignore[arg-type]
    return Step(batch, told.chosen, drawn, columns["at"])


class Driver(Runner):
    """Rank 0's runner: the other ranks hear of all that it does together with them."""

    def __init__(self, network: Network, slots: WorkerSlots, share: Share | None, group: GlooGroup):
        super().__init__(network, slots, share)
        self._group = group

    def call(self, method: str, arguments: dict[str, Any]) -> Any:
        tell(self._group, Call(method, arguments))
        return super().call(method, arguments)

    def _compute(self, batch: StepBatch, choice: Choice) -> None:
        tell(self._group, Step.of(batch, choice))
        super()._compute(batch, choice)

    def close(self) -> None:
        if not self.waits_to_be_sampled:  # else the others wait for that, and end when this process does
            tell(self._group, None)


class Follower:
    """Any other rank: its share of the model, and no state of requests."""

    def __init__(self, network: Network, share: Share | None, group: GlooGroup):
        self._network = network
        self._calls = Adapters(network, {"": -1}, share).calls
        self._group = group

    @torch.inference_mode()
    def follow(self) -> None:
        """Do what rank 0 tells, to the end."""
        while (told := hear(self._group)) is not None:
            if isinstance(told, Step):
                self._run(told)
            else:
                self._call(told)

    def _call(self, call: Call) -> None:
        """Whatever it fails of, rank 0 fails of it too and answers; but for the loss of another rank."""
        try:
            self._calls[call.method](**call.arguments)
        except PeerLostError:
            raise
        except RedlineError:
            pass
        except Exception:
            log.exception("a call failed")

    def _run(self, step: Step) -> None:
        self._network.forward(step.batch)
        if step.chosen:
            samples = len(step.batch.sampled_at)
            drawn = (np.zeros(samples, np.float32), np.zeros(samples)) if step.drawn is None else step.drawn
            self._network.choose(*drawn)
        if len(step.at):
            self._network.logits(step.at)
        for which in prompt_logprobs.parts(step.batch):
            self._network.logits(which)


def build_driven(
    config: EngineConfig, facts: ModelFacts, resolved: ResolvedConfig, blank: Blank, split: Split, group: GlooGroup
) -> tuple[Driver | Follower, Built]:
    """What `build_runner` builds, for ranks of which the first drives the others."""
    built, share = build_parts(config, facts, resolved, blank, split)
    if group.rank == 0:
        return Driver(built.network, build_slots(resolved), share, group), built
    return Follower(built.network, share, group), built
