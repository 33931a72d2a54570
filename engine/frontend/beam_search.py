"""Beam search: the most likely sequences of tokens, found by keeping the best ones after each token.

The engine knows nothing of it. Each step sends one request per beam, for one token and its most likely alternatives;
all but the last token of a beam are in the prefix cache.
"""

from collections.abc import Sequence

import msgspec

from engine.errors import EngineDeadError, RequestError
from engine.frontend.connect import EngineClient
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.prompts import Prompt
from engine.frontend.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.frontend.streams import (
    CollectedOutput,
    Delta,
    Origin,
    RequestOptions,
    RequestStream,
    TokenLogprob,
    collect_outputs,
)

ALTERNATIVES = 2  # for each beam that is kept, so that beams that end leave enough others
WIDEST = MAX_LOGPROBS // ALTERNATIVES
# Parameters that choose or end single tokens; a search would ignore them.
EXCLUDED = (
    "stop", "stop_token_ids", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "bad_words", "allowed_token_ids", "prompt_logprobs",
)  # fmt: skip
DEFAULTS = SamplingParams()


class Beam(msgspec.Struct):
    """A sequence of tokens, with the sum of their logprobs."""

    tokens: list[TokenLogprob]
    total: float = 0.0
    ended: bool = False

    @property
    def ids(self) -> list[int]:
        return [entry.token for entry in self.tokens]

    def score(self, length_penalty: float) -> float:
        return self.total / len(self.tokens) ** length_penalty

    def extended(self, entry: TokenLogprob, *, ended: bool) -> "Beam":
        return Beam([*self.tokens, entry], self.total + entry.logprob, ended)


def check_beams(params: SamplingParams) -> None:
    """Raise RequestError for parameters that beam search excludes."""
    if params.n > WIDEST:
        raise RequestError(f"n must lie in 1..{WIDEST} with use_beam_search, not {params.n}", "n")
    if params.structured_outputs is not None:
        field = params.structured_outputs.field
        raise RequestError(f"{field} can't be used with use_beam_search", field)
    for name in EXCLUDED:
        if (value := getattr(params, name)) and value != getattr(DEFAULTS, name):
            raise RequestError(f"{name} can't be used with use_beam_search", name)


class NoCore:
    """The client of a stream that is not sent to a core itself."""

    def __init__(self) -> None:
        self.touched: list[RequestStream] = []

    def abort(self, stream: RequestStream) -> None:
        stream.wake()


class BeamStream(RequestStream):
    """The beams of a request as its outputs, which arrive all at once.

    The constructor raises RequestError for prompts or parameters that can't be served.
    """

    def __init__(
        self, client: EngineClient, prompts: Sequence[Prompt], params: SamplingParams, options: RequestOptions,
        origin: Origin,
    ):  # fmt: skip
        check_beams(params)
        super().__init__(prompts, params, NoCore(), client.clock.now(), origin, options)
        self._engine = client
        self._running: RequestStream | None = None
        self._closed = self._done = False
        for prompt in prompts:
            if not isinstance(prompt, list):
                raise RequestError("use_beam_search needs a server that tokenizes in its front end", "use_beam_search")
            client.check_prompt(prompt)

    async def __anext__(self) -> list[Delta]:
        if self._done:
            raise StopAsyncIteration
        self._done = True
        deltas = []
        for number, prompt in enumerate(self.prompts):
            assert isinstance(prompt, list)
            beams = await self._search(number, prompt)
            deltas += [self._delta(number * self.params.n + place, prompt, beam) for place, beam in enumerate(beams)]
        return deltas

    def close(self) -> None:
        """End the search."""
        self._closed = True
        if self._running is not None:
            self._running.close()

    @property
    def _step_params(self) -> SamplingParams:
        most = ALTERNATIVES * self.params.n
        return SamplingParams(max_tokens=1, temperature=0, logprobs=most, ignore_eos=True)

    async def _search(self, number: int, prompt: list[int]) -> list[Beam]:
        """The best beams of a prompt, in order."""
        width, penalty = self.params.n, self.params.length_penalty
        room = self._engine.ready.max_model_len - len(prompt)
        end_ids = frozenset() if self.params.ignore_eos else frozenset(self._engine.tokenizer.eos_ids)
        beams, ended = [Beam([])], list[Beam]()
        for step in range(room if self.params.max_tokens is None else min(self.params.max_tokens, room)):
            outputs = await self._extend([prompt + beam.ids for beam in beams])
            if step == 0:
                assert self._running is not None
                self.cached_tokens[number] = self._running.cached_tokens[0]
            grown = [
                beam.extended(TokenLogprob(token, logprob, rank, entry.top), ended=token in end_ids)
                for beam, output in zip(beams, outputs, strict=True)
                for entry in output.logprobs
                for rank, (token, logprob) in enumerate(entry.top, start=1)
            ]
            ended += [beam for beam in grown if beam.ended]
            beams = sorted((beam for beam in grown if not beam.ended), key=lambda beam: -beam.total)[:width]
        return sorted([*ended, *beams], key=lambda beam: -beam.score(penalty))[:width]

    async def _extend(self, prompts: list[list[int]]) -> list[CollectedOutput]:
        """One more token of each beam."""
        if self._closed:
            raise EngineDeadError("the request was closed")
        stream = self._running = self._engine.add_request(prompts, self._step_params, self.options, self.origin)
        async with stream:
            outputs = await collect_outputs(stream)
        if not all(output.logprobs for output in outputs):
            raise EngineDeadError("the server shut down before the search ended")
        return outputs

    def _delta(self, index: int, prompt: list[int], beam: Beam) -> Delta:
        """A beam as the only delta of its output."""
        params, shown = self.params, beam.tokens
        if beam.ended and not params.include_stop_str_in_output:
            shown = shown[:-1]
        detokenizer = Detokenizer(
            self._engine.tokenizer, prompt, skip_special_tokens=params.skip_special_tokens,
            visible_ids=params.visible_special_ids,
        )  # fmt: skip
        text = "".join(detokenizer.push(entry.token)[0] for entry in shown) + detokenizer.finish()
        top = params.logprobs
        entries = None if top is None else [msgspec.structs.replace(one, top=one.top[:top]) for one in beam.tokens]
        return Delta(index, text, beam.ids, entries, "stop" if beam.ended else "length")
