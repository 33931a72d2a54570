"""Two cores that exchange the blocks of prompts with multimodal inputs, without front ends."""

from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from engine.clock import FakeClock
from engine.columns import column, int32s
from engine.core.disaggregated_core import DisaggregatedCore
from engine.core.incoming_blocks import ArrivedBlocks
from engine.core.outgoing_blocks import Shipment
from engine.disaggregation import DECODE, PREFILL
from engine.kv_transfer import KVPush, PrefillEnded
from engine.messages import AddRequest, Finished, FinishReason, MMInputRef, Outputs, Sampling, decode_from_core, encode
from tests.engine.core_driver import next_wait, resolved
from tests.engine.fake_executor import FakeExecutor, expected_tokens

PLACEHOLDER = 3
WAITS, COMPUTES = 1, 2  # handles
PROMPT = [1, 2, *[PLACEHOLDER] * 6, *range(10, 35)]
INPUT = MMInputRef(b"image", 2, 6)


class Pair:
    """A prefill core and a decode core; blocks arrive at once."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.tokens: list[int] = []
        self.ended: dict[int, Finished] = {}
        self.sent_at: list[float] = []
        self.fault = ""  # of the connection
        self.prefill, self.computing = self._make(PREFILL, self._on_prefill)
        self.decode, self.waiting = self._make(DECODE, self._on_decode)
        self.prefill.send_blocks, self.prefill.link_fault = self._send, lambda _: self.fault
        self.message = AddRequest(
            WAITS, column(PROMPT), 5, Sampling(), mm_inputs=(INPUT,), remote_prefill=True
        )  # fmt: skip

    def _make(self, role: str, on_outputs: Callable[[Outputs], None]) -> tuple[DisaggregatedCore, FakeExecutor]:
        config = resolved(role=role, transfer_blocks=16, encoder_cache_tokens=16)
        worker = FakeExecutor(self.clock, config.block_size, lambda _, tokens: 1.0 if tokens else 0.0)

        def receive(_front_end: int, data: bytes) -> None:
            message = decode_from_core(data)
            assert isinstance(message, Outputs)
            on_outputs(message)

        return DisaggregatedCore(config, worker, self.clock, receive), worker

    def _on_decode(self, outputs: Outputs) -> None:
        self.tokens += int32s(outputs.tokens).tolist()
        self.ended |= {one.handle: one for one in outputs.finished}
        for wanted in outputs.prefills:
            push = KVPush("decode", wanted.handle, wanted.cached_blocks)
            computes = replace(self.message, handle=COMPUTES, max_tokens=1, remote_prefill=False, push=push)
            self.prefill.receive(encode(computes))

    def _on_prefill(self, outputs: Outputs) -> None:
        self.ended |= {one.handle: one for one in outputs.finished}
        for one in outputs.finished:
            self.decode.receive(encode(PrefillEnded(WAITS, one.error)))

    def _send(self, shipment: Shipment) -> None:
        self.sent_at.append(self.clock.now())
        for place, key, block in zip(shipment.header.places, shipment.keys, shipment.host_blocks, strict=True):
            content: Any = list(self.computing.host[block])
            assert self.decode.scheduler.incoming.put(
                WAITS, place, key, lambda host_block, content=content: self.waiting.host.update({host_block: content})
            )
        self.decode.receive_blocks(ArrivedBlocks(WAITS, shipment.header.places, shipment.header.cached_tokens))
        self.prefill.scheduler.outgoing.give_back(shipment.host_blocks)

    def run(self) -> None:
        self.decode.receive(encode(self.message))
        pairs = ((self.prefill, self.computing), (self.decode, self.waiting))
        for _ in range(1000):
            now = self.clock.now()
            if sum(core.step(now) for core, _ in pairs):
                continue
            due = [wait for core, worker in pairs if (wait := next_wait(core, worker, now)) is not None]
            if not due:
                return
            self.clock.advance(min(due))
            for _, worker in pairs:
                worker.pump()
        raise AssertionError("it never ends")


def test_a_prompt_with_an_input_is_sent_once_all_of_it_is_computed():
    pair = Pair()
    pair.run()
    assert pair.tokens == expected_tokens(PROMPT, 5, mm_inputs=(INPUT,))
    assert pair.ended[COMPUTES].reason == FinishReason.LENGTH
    assert pair.computing.encoded == [b"image"]
    assert pair.waiting.encoded == [], "the placeholders are in blocks that arrived"
    assert set(pair.sent_at) == {3.0}, "after the third step"
    assert pair.decode.scheduler.stats(0.0).kv_transfers == 1
    assert pair.decode.scheduler.stats(0.0).kv_transfers_lost == 0


def test_nothing_is_sent_of_a_prompt_whose_input_can_not_be_encoded():
    pair = Pair()
    pair.computing.fails = lambda: True
    pair.run()
    assert pair.ended[COMPUTES].reason == FinishReason.NOT_ENCODED
    assert not pair.sent_at
    assert pair.waiting.encoded == [b"image"], "the decode replica tries it itself"
    assert pair.tokens == expected_tokens(PROMPT, 5, mm_inputs=(INPUT,))
    assert not pair.prefill.has_work
    assert not pair.prefill.scheduler.outgoing._pushes


def test_nothing_is_computed_for_a_replica_that_can_not_be_reached(caplog: pytest.LogCaptureFixture):
    pair = Pair()
    pair.fault = "the connection to decode is lost"
    pair.run()
    assert pair.ended[COMPUTES].reason == FinishReason.UNREACHABLE
    assert pair.ended[COMPUTES].error == pair.fault
    assert not pair.computing.steps
    assert pair.tokens == expected_tokens(PROMPT, 5, mm_inputs=(INPUT,))
    assert pair.clock.now() == 7.0, "three steps for the prompt and four for the other tokens: it has not waited"
    assert pair.decode.scheduler.stats(0.0).kv_transfers_lost == 1
    assert f"8 KV blocks of a prompt are computed here: {pair.fault}" in caplog.text
