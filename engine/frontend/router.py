"""N replicas as one engine: a Router has what the API asks of a CoreClient, over a client each.

A stream stays with the replica that it was given to. If that one dies before anything came of the stream, another one
begins it again, unseen; else it fails with the cause. The others serve on, and the last to die ends the server.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import EngineDeadError, RedlineError, cause_of
from engine.frontend.calls import Calls
from engine.frontend.client import NOBODY, STOPPED, CoreClient
from engine.frontend.logs import Ended
from engine.frontend.prompts import Prompt, Text, length_of
from engine.frontend.routing import Backlog, Held, Lengths, Standing, block_names, held_tokens, make_routing
from engine.frontend.sampling import SamplingParams
from engine.frontend.stats import FrontEndStats
from engine.frontend.streams import Origin, Output, RequestStream, Terms
from engine.messages import Finished

log = logging.getLogger("redline.router")

CHARACTERS = 4  # of a text, about as many as a token has


class Replica(CoreClient):
    """The client of one replica, which knows what that was given and has still to do."""

    def __init__(self, number: int, lengths: Lengths, *client: Any, **settings: Any):
        """`lengths` is what all replicas learn from; the rest is CoreClient's."""
        super().__init__(*client, **settings)
        self.number = number
        self.held = Held(self.ready.num_blocks // len(self.ready.kv_windows))  # a content has a block in each group
        self.given = 0.0  # tokens, ever
        self.stopping: Callable[[], bool] = lambda: False  # whether all replicas end, and this one only with them
        self.rescue: Callable[[RequestStream], bool] = lambda _: False
        self._lengths = lengths
        self._backlog = Backlog()

    def tokens_left(self) -> float:
        """What it has still to compute of what all front ends gave it."""
        self._backlog.settle()
        self.stats.load = self._backlog.tokens
        return self.stats.load if self.board is None else sum(one.load for one in self.board.stats)

    def take(self, stream: RequestStream, held: Sequence[int]) -> None:
        """Begin a stream; `held` are the tokens of each of its prompts that needn't be computed."""
        self.submit(stream)
        choices = stream.params.n
        shared = self.ready.prefix_caching and stream.params.prompt_logprobs is None
        expected = self._lengths.expected(stream.params.max_tokens)
        for output in stream.live.values():
            first = output.index % choices == 0  # the others find its blocks
            missing = tokens_of(stream.prompts[output.prompt]) - held[output.prompt] if first or not shared else 0
            self._backlog.add(output, missing, expected)
            self.given += missing + expected
        self.stats.load = self._backlog.tokens

    def let_go(self, stream: RequestStream) -> None:
        """Forget a stream that another replica takes over."""
        for handle in list(stream.live):
            del self._live[handle], stream.live[handle]
            self._backlog.end(handle)
        self.stats.live, self.stats.load = len(self._live), self._backlog.tokens

    def die(self, cause: str) -> None:
        super().die(cause if self.stopping() else f"replica {self.number}: {cause}")

    def _fail_all(self, error: EngineDeadError) -> None:
        if not self.stopping():
            streams = {id(output.stream): output.stream for output in self._live.values()}
            moved = sum(self._move(stream) for stream in streams.values() if stream.untouched)
            if moved:
                log.warning("%d request(s) of replica %d begin again elsewhere", moved, self.number)
        super()._fail_all(error)

    def _move(self, stream: RequestStream) -> bool:
        """`rescue`; where that fails, only this stream does."""
        try:
            return self.rescue(stream)
        except Exception as error:
            log.exception("a request of replica %d could not begin again elsewhere", self.number)
            stream.fail(RedlineError(f"{self.dead}; the request could not begin again elsewhere: {cause_of(error)}"))
            return False

    def _drop(self, output: Output, reason: str, finished: Finished | None = None) -> None:
        super()._drop(output, reason, finished)
        self._backlog.end(output.handle)
        self.stats.load = self._backlog.tokens
        if reason in ("stop", "length"):
            self._lengths.learn(output.count)

    def _tell(self, ended: Ended) -> None:
        ended.replica = self.number
        super()._tell(ended)


class Router:
    """Several replicas of one engine, seen as one; lives in one event loop as its clients do."""

    def __init__(self, replicas: Sequence[Replica], routing: str, seed: int = 0):
        """`routing` is one of `engine.config.ROUTINGS`, `seed` that of the random one."""
        self.replicas = tuple(replicas)
        first = self.replicas[0]
        self.ready = first.ready  # all are made alike
        self.tokenizer = first.tokenizer
        self.clock = first.clock
        self.alone = first.alone
        self.routing = routing
        self.dead: str | None = None  # the cause, once no replica is left
        self.on_death: Callable[[str], None] | None = None
        self._routing = make_routing(routing, seed)
        self._calls = Calls(self._serving, lambda: self.dead or "the replicas ended meanwhile")
        for replica in self.replicas:
            replica.stopping = lambda: self.dead is not None
            replica.rescue = self._rescue
            replica.on_death = self._on_loss

    def open(self) -> None:
        """Start to listen; called inside the event loop that will use the router."""
        for replica in self.replicas:
            replica.open()

    def close(self) -> None:
        """Stop to listen; whoever still reads a stream is told so."""
        self.on_death = None
        self.die(STOPPED)
        for replica in self.replicas:
            replica.close()

    # ------------------------------------------------------------------------------------------------------- requests

    def add(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        priority: int = 0,
        origin: Origin = NOBODY,
        adapter: str = "",
    ) -> RequestStream:
        """Start `params.n` outputs for each prompt, all on one replica; see `CoreClient.add`."""
        able = preferred(self._serving())
        able[0].check(prompts, params, priority)
        terms = Terms(cache_salt, priority, adapter)
        stream = RequestStream(prompts, params, able[0], self.clock.now(), origin, terms)
        self._route(stream, able)
        return stream

    def check_prompt(self, prompt: list[int]) -> None:
        """See `CoreClient.check_prompt`."""
        self.replicas[0].check_prompt(prompt)

    def _route(self, stream: RequestStream, able: Sequence[Replica]) -> None:
        """Give a stream to the replica that the routing chooses."""
        size, lengths = self.ready.block_size, stream.prompt_lengths
        names: list[list[bytes]] = [[] for _ in lengths]
        if self._routing.by_prefix and self.ready.prefix_caching:
            names = [[] if isinstance(one, Text) else block_names(one, stream.terms, size) for one in stream.prompts]
        # Who asks for logprobs of the prompt has all of it computed.
        reads = stream.params.prompt_logprobs is None
        held = [held_tokens(names, lengths, replica.held, size) if reads else [0] * len(lengths) for replica in able]
        position = self._routing.choose(
            [Standing(one.tokens_left(), sum(tokens), one.given) for one, tokens in zip(able, held, strict=True)]
        )
        chosen = able[position]
        chosen.take(stream, held[position])
        for blocks in names:
            chosen.held.note(blocks)

    def _rescue(self, stream: RequestStream) -> bool:
        """Begin a stream again that its dying replica made nothing of; False if none can, or it was moved before.

        Twice would let a request that kills its replica kill them all.
        """
        living = self._living()
        if not living or stream.moved:
            return False
        stream.moved = True
        old = stream.client
        assert isinstance(old, Replica), "a router's streams are its replicas'"
        old.let_go(stream)
        self._route(stream, preferred(living))
        return True

    def _living(self) -> list[Replica]:
        return [replica for replica in self.replicas if replica.dead is None]

    def _serving(self) -> list[Replica]:
        """The replicas that live; EngineDeadError if none does."""
        if self.dead is not None:
            raise EngineDeadError(self.dead)
        return self._living()

    def live_count(self) -> int:
        return sum(replica.live_count() for replica in self.replicas)

    # ------------------------------------------------------------------------------------------------------- utilities

    async def call(self, method: str, **arguments: Any) -> Any:
        """Call a utility of all replicas; RedlineError if one can't, and then none has done it."""
        if method == "adapters":  # whoever hangs can't tell
            results = await self._calls.some_do(method, arguments)
            return {name: path for name, path in results[0].items() if all(name in one for one in results)}
        try:
            results = await self._calls.all_do(method, arguments)
        finally:
            if method == "reset_prefix_cache":
                for replica in self.replicas:
                    replica.held.clear()
        return sum(results) if method == "reset_prefix_cache" else results[0]

    # ----------------------------------------------------------------------------------------------------------- state

    @property
    def total_stats(self) -> FrontEndStats:
        """The stats of all replicas and front ends together, now."""
        lost = [replica.dead is not None for replica in self.replicas]
        return FrontEndStats.of_replicas([replica.total_stats for replica in self.replicas], lost)

    @property
    def hung(self) -> str:
        """The cause, while no replica steps."""
        living = self._living()
        return living[0].hung if living and all(replica.hung for replica in living) else ""

    @property
    def on_ended(self) -> Callable[[Ended], None] | None:
        return self.replicas[0].on_ended

    @on_ended.setter
    def on_ended(self, hear: Callable[[Ended], None] | None) -> None:
        for replica in self.replicas:
            replica.on_ended = hear

    def health(self) -> list[dict[str, Any]]:
        """Each replica's state: number, process, status (ok, hung or dead), its cause, what runs and waits."""
        found = []
        for replica in self.replicas:
            core = replica.total_stats.core
            status = "dead" if replica.dead is not None else "hung" if replica.hung else "ok"
            known: dict[str, Any] = {"replica": replica.number, "process": replica.ready.process_id, "status": status}
            if status == "dead":
                found.append(known | {"cause": replica.dead, "running": 0, "waiting": 0})
            else:
                cause = {"cause": replica.hung} if replica.hung else {}
                found.append(known | cause | {"running": core.running, "waiting": core.waiting})
        return found

    # --------------------------------------------------------------------------------------------------------- the end

    def lose(self, number: int, cause: str) -> None:
        """A replica is gone: what has begun on it fails, the rest moves; with the last one all ends."""
        self.replicas[number].die(cause)

    def lose_threadsafe(self, number: int, cause: str) -> None:
        """`lose`, from any thread; for `Engine.watch`."""
        self.replicas[number].die_threadsafe(cause)

    def die(self, cause: str) -> None:
        """All ends: every reader and caller gets the cause, and so does whoever asks from now on."""
        if self.dead is not None:
            return
        self.dead = cause
        for replica in self.replicas:
            replica.die(cause)
        if self.on_death is not None:
            self.on_death(cause)

    def _on_loss(self, cause: str) -> None:
        """A replica died, by itself or with all."""
        if self.dead is not None:
            return
        living = len(self._living())
        log.error("%s; %d of %d replicas serve on", cause, living, len(self.replicas))
        if not living:
            self.die(f"no replica is left; {cause}")


def preferred(living: Sequence[Replica]) -> Sequence[Replica]:
    """Who is to take requests: those that step, or all if none does."""
    return [replica for replica in living if not replica.hung] or living


def tokens_of(prompt: Prompt) -> int:
    """Its tokens, guessed for a text."""
    return length_of(prompt) if isinstance(prompt, list) else len(prompt.text) // CHARACTERS
