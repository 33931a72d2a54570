"""Prefill and decode replicas in one thread: real cores, a real router, and a network between them that may fail."""

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from msgspec.structs import replace

from engine.clock import FakeClock
from engine.core.disaggregated_core import DisaggregatedCore
from engine.core.disaggregated_scheduler import DisaggregatedSpillScheduler
from engine.core.incoming_blocks import ArrivedBlocks
from engine.core.outgoing_blocks import Shipment
from engine.disaggregation import DECODE, PREFILL
from engine.frontend.disaggregation import DisaggregatedClient, DisaggregatedRouter
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import RequestStream
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.kv_format import CorruptBlockError
from engine.kv_transfer import Place
from engine.messages import Ready
from tests.engine.core.spill_driver import FakeFiles
from tests.engine.core_driver import next_wait, resolved
from tests.engine.fake_executor import VOCABULARY, FakeExecutor
from tests.engine.inline_transport import InlineTransport

TOKENIZER = Tokenizer(StandInBackend(VOCABULARY))
STEP_S = 1.0


@dataclass
class Parcel:
    """A shipment on its way, with the content that its host blocks had when it was sent."""

    shipment: Shipment
    content: list[list[bytes | None]]
    turns: int  # until it arrives


class DisaggregatedFleet:
    """Steps take a second; made inside an event loop, and moved only by `turn` and `run`.

    Args:
        delay: turns that the next shipment takes; None: it is lost.
        damage: whether the next block is damaged on its way.
        fault: why the first replica can't reach the second one; empty: it can.
        disk_blocks: files of each replica; it has `host_blocks` too.
    """

    def __init__(
        self,
        prefill: int = 1,
        decode: int = 1,
        delay: Callable[[], int | None] = lambda: 0,
        damage: Callable[[], bool] = lambda: False,
        fault: Callable[[int, int], str] = lambda _first, _second: "",
        disk_blocks: int = 0,
        **more: Any,
    ):
        self.clock = FakeClock()
        self._disk_blocks = disk_blocks
        self.files: list[FakeFiles] = []
        self._delay, self._damage, self._fault = delay, damage, fault
        self.parcels: deque[Parcel] = deque()
        self.cores: list[DisaggregatedCore] = []
        self.workers: list[FakeExecutor] = []
        self.read: dict[int, list[int]] = {}  # tokens by id of the stream
        self._more = {"transfer_blocks": 16, "max_model_len": 64, "num_blocks": 65, **more}
        clients, numbers = [], itertools.count(1)
        for number in range(prefill + decode):
            transport = InlineTransport()
            role = PREFILL if number < prefill else DECODE
            core, ready = self._start(number, role, transport)
            clients.append(
                DisaggregatedClient(ready, TOKENIZER, transport, self.clock, numbers=numbers, replica=number)
            )
            self.cores.append(core)
        self.router = DisaggregatedRouter(clients, "prefix")
        self.router.open()

    def _start(self, number: int, role: str, transport: InlineTransport) -> tuple[DisaggregatedCore, Ready]:
        config = resolved(role=role, **self._more)
        worker = FakeExecutor(
            self.clock, config.block_size, lambda _, tokens: STEP_S if tokens else 0.0, windows=config.kv_windows
        )
        core = DisaggregatedCore(config, worker, self.clock, transport.from_core)
        core.send_blocks = lambda shipment: self._send(worker, core, shipment)
        core.link_fault = lambda address: self._fault(number, int(address))
        if self._disk_blocks:
            assert isinstance(core.scheduler, DisaggregatedSpillScheduler)
            self.files.append(FakeFiles(worker))
            core.scheduler.use_disk(self._disk_blocks, self.files[-1])
        transport.receive = core.receive
        self.workers.append(worker)
        ready = Ready(
            "fake", "fake", "float32", VOCABULARY, config.max_model_len, config.max_num_seqs,
            config.max_num_batched_tokens, config.block_size, config.num_blocks - 1, True, role=role,
            kv_address=str(number), kv_windows=config.kv_windows,
        )  # fmt: skip
        return core, ready

    def _send(self, worker: FakeExecutor, core: DisaggregatedCore, shipment: Shipment) -> None:
        turns = self._delay()
        if turns is not None:
            content = [list(worker.host[block]) for block in shipment.host_blocks]
            self.parcels.append(Parcel(shipment, content, turns))
        for block in shipment.host_blocks:
            worker.host[block] = [b"sent"]
        core.scheduler.outgoing.give_back(shipment.host_blocks)

    def _deliver(self) -> bool:
        """Deliver what has arrived; False if nothing is on its way."""
        moved = bool(self.parcels)
        for parcel in [one for one in self.parcels if one.turns <= 0]:
            self.parcels.remove(parcel)
            number = int(parcel.shipment.address)
            if number in self.living:
                self._put(self.cores[number], self.workers[number], parcel)
        for parcel in self.parcels:
            parcel.turns -= 1
        return moved

    def _put(self, core: DisaggregatedCore, worker: FakeExecutor, parcel: Parcel) -> None:
        header, arrived, rejected = parcel.shipment.header, list[Place](), 0

        def write(content: list[bytes | None], host_block: int) -> None:
            worker.host[host_block] = content
            if self._damage():
                worker.host[host_block] = [b"damaged"] * len(content)
                raise CorruptBlockError("it was damaged")

        for place, key, content in zip(header.places, parcel.shipment.keys, parcel.content, strict=True):
            try:
                if core.scheduler.incoming.put(header.handle, place, key, partial(write, content)):
                    arrived.append(place)
            except CorruptBlockError:
                rejected += 1
        core.receive_blocks(ArrivedBlocks(header.handle, tuple(arrived), header.cached_tokens, rejected))

    # ------------------------------------------------------------------------------------------------------- requests

    def add(self, prompt: list[int], max_tokens: int = 4, **params: Any) -> RequestStream:
        given = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **params)
        stream = self.router.add_request([prompt], given)
        self.read[id(stream)] = []
        return stream

    def take(self, stream: RequestStream) -> list[int]:
        """All tokens so far; raises what the stream does."""
        self.read[id(stream)] += [token for delta in stream.take_deltas() for token in delta.token_ids]
        assert stream.is_open is not None
        return self.read[id(stream)]

    def place(self, stream: RequestStream) -> int:
        """The replica that has it."""
        assert isinstance(stream.client, DisaggregatedClient)
        return stream.client.replica

    # -------------------------------------------------------------------------------------------------------- replicas

    def kill(self, number: int) -> None:
        self.router.core_lost(number, "it was killed")

    def restart(self, number: int) -> None:
        transport = InlineTransport()
        client = self.router.trackers[number].client
        core, ready = self._start(number, client.ready.role, transport)
        self.cores[number], self.workers[number] = core, self.workers.pop()
        self.router.core_up(number, replace(ready, process_id=number), transport)

    @property
    def living(self) -> list[int]:
        return [one.client.replica for one in self.router.trackers if one.client.dead is None]

    # ------------------------------------------------------------------------------------------------------------ time

    def turn(self) -> bool:
        """Let all that live do what they can, then go on to what is due next; False if nothing was left to do."""
        now, living = self.clock.now(), self.living
        moved = False
        for number in living:
            moved |= self.cores[number].step(now)
            self.cores[number].scheduler.check()
        moved |= self._deliver()
        for files in self.files:
            files.pump(1)
        if moved:
            return True
        waits = [next_wait(self.cores[number], self.workers[number], now) for number in living]
        due = [wait for wait in waits if wait is not None]
        if due:
            self.clock.advance(min(due))
            for number in living:
                self.workers[number].pump()
        return bool(due) or any(self.cores[number].has_work for number in living)

    def run(self) -> None:
        for _ in range(20_000):
            if not self.turn():
                return
        raise AssertionError("it never ends")

    def check_idle(self) -> None:
        """Nothing of any request is left, once files are written."""
        for _ in range(20):
            for files in self.files:
                files.pump(100)
            for number in self.living:
                self.cores[number].step(self.clock.now())
        for number in self.living:
            scheduler = self.cores[number].scheduler
            incoming, outgoing = scheduler.incoming, scheduler.outgoing
            assert not scheduler.requests
            if isinstance(scheduler, DisaggregatedSpillScheduler):
                assert not any(scheduler.tiers.host._pins), "host blocks of the tiers are left pinned"
            assert not incoming.waiting
            assert len(incoming._free) == incoming.capacity, "host blocks of a transfer are left"
            assert len(set(incoming._free)) == incoming.capacity, "a host block is free twice"
            assert not outgoing._pushes, "blocks are left to be sent"
            tracker = self.router.trackers[number]
            assert not tracker.prefills  # type: ignore[attr-defined]
            assert not tracker.wanted  # type: ignore[attr-defined]
            assert tracker.tokens_left() == 0
