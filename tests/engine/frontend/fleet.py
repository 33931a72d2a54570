"""Real cores behind a real router in one thread: workers without a model, under a clock that the test moves."""

import itertools
from typing import Any

from engine.clock import FakeClock
from engine.core.engine import EngineCore
from engine.core.grammars import GrammarManager
from engine.frontend.core_client import CoreClient
from engine.frontend.front_end_stats import Board
from engine.frontend.grammar_vocabulary import GrammarVocabulary
from engine.frontend.router import Router
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Delta, RequestOptions, RequestStream
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import StandInBackend
from engine.messages import AddRequest, FromCore, Ready, decode_to_core, encode
from tests.engine.core_driver import next_wait, resolved
from tests.engine.fake_executor import VOCABULARY, FakeExecutor
from tests.engine.inline_transport import InlineTransport

TOKENIZER = Tokenizer(StandInBackend(VOCABULARY))


class Fleet:
    """Replicas whose steps take a second; made inside an event loop, and stepped only by `turn` and `run`."""

    def __init__(
        self,
        count: int,
        routing: str = "prefix",
        seed: int = 0,
        boards: list[Board] | None = None,
        *,
        supervised: bool = False,
        spilled_blocks: tuple[int, int] = (0, 0),
        **more: Any,
    ):
        """`spilled_blocks`: what the router is told of the tiers; `more` are fields of the cores' configuration."""
        self.config = config = resolved(**more)
        self.clock = FakeClock()
        self.cores: list[EngineCore] = []
        self.workers: list[FakeExecutor] = []
        self.transports: list[InlineTransport] = []
        self.added: list[list[AddRequest]] = [[] for _ in range(count)]  # what each core was sent
        self.read: dict[int, list[int]] = {}  # tokens by id of the stream, one output each
        self.ready = Ready(
            "fake", "fake", "float32", VOCABULARY, config.max_model_len, config.max_num_seqs,
            config.max_num_batched_tokens, config.block_size, config.num_blocks - 1, True,
            spilled_blocks=spilled_blocks,
        )  # fmt: skip
        self._boards, self._numbers = boards, itertools.count(1)
        replicas = [self._make(number) for number in range(count)]
        self.router = Router(replicas, routing, seed, supervised=supervised)
        self.router.open()

    def _make(self, number: int) -> CoreClient:
        """A core, and its client."""
        core, worker, transport = self._start(number)
        self.cores.append(core)
        self.workers.append(worker)
        self.transports.append(transport)
        board = self._boards[number] if self._boards else None
        return CoreClient(
            self.ready, TOKENIZER, transport, self.clock, board=board, numbers=self._numbers, replica=number
        )

    def grow(self) -> None:
        """One more replica."""
        number = len(self.cores)
        self.router.core_starting(number)
        self.added.append([])
        self.router.core_added(self._make(number))

    def _start(self, number: int) -> tuple[EngineCore, FakeExecutor, InlineTransport]:
        worker = FakeExecutor(self.clock, self.config.block_size, lambda *_: 1.0)
        transport = InlineTransport()
        grammars = GrammarManager(lambda: GrammarVocabulary(TOKENIZER, VOCABULARY))
        core = EngineCore(self.config, worker, self.clock, transport.from_core, grammars=grammars)
        transport.receive = self._receiver(number, core)
        return core, worker, transport

    def restart(self, number: int) -> None:
        """A new core in place of one that was killed."""
        self.cores[number], self.workers[number], self.transports[number] = self._start(number)
        self.router.core_up(number, self.router.cores[number].ready, self.transports[number])

    def _receiver(self, number: int, core: EngineCore) -> Any:
        def receive(data: bytes) -> None:
            assert self.router.cores[number].dead is None, "a message for a replica that is gone"
            message = decode_to_core(data)
            if isinstance(message, AddRequest):
                self.added[number].append(message)
            core.receive(data)

        return receive

    def add(self, prompt: list[int], max_tokens: int = 4, **more: Any) -> RequestStream:
        params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
        stream = self.router.add_request([prompt], params, RequestOptions(**more))
        self.read[id(stream)] = []
        return stream

    def place(self, stream: RequestStream) -> int:
        """The replica that has it."""
        assert isinstance(stream.client, CoreClient)
        return stream.client.replica

    def take(self, stream: RequestStream) -> list[int]:
        """All tokens so far; raises what the stream does."""
        deltas: list[Delta] = stream.take_deltas()
        self.read[id(stream)] += [token for delta in deltas for token in delta.token_ids]
        assert stream.is_open is not None
        return self.read[id(stream)]

    def say(self, number: int, message: FromCore) -> None:
        """A core says something by itself."""
        self.transports[number].from_core(0, encode(message))

    def kill(self, number: int) -> None:
        self.router.core_lost(number, "it was killed")

    @property
    def living(self) -> list[int]:
        return [client.replica for client in self.router.cores if client.dead is None]

    def turn(self) -> bool:
        """Let all that live do what they can, then go on to what is due next; False if nothing was left to do."""
        for number in self.living:
            self.cores[number].step(self.clock.now())
        waits = [next_wait(self.cores[number], self.workers[number], self.clock.now()) for number in self.living]
        due = [wait for wait in waits if wait is not None]
        if due:
            self.clock.advance(min(due))
            for number in self.living:
                self.workers[number].pump()
        return bool(due) or any(self.cores[number].has_work for number in self.living)

    def run(self) -> None:
        for _ in range(10_000):
            if not self.turn():
                return
        raise AssertionError("it never ends")
