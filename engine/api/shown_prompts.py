"""What an answer shows of its prompts: an echo, with or without logprobs, vLLM's prompt_logprobs, token ids."""

from collections.abc import Sequence
from typing import Any

from engine.api.logprobs import TextOffsets, at_most, echoed_logprobs, prompt_logprobs
from engine.api.protocol import CompletionRequest, SampledRequest
from engine.frontend.streams import Delta, RequestStream, TokenLogprob, Whole
from engine.frontend.tokenizer import Tokenizer

LONG = 2048  # logprobs of prompts are written on a thread: streams go on meanwhile


class ShownPrompts:
    """The prompts of one request, by the outputs that they are shown with."""

    def __init__(self, tokenizer: Tokenizer, stream: RequestStream, body: SampledRequest):
        self._tokenizer = tokenizer
        self._stream = stream
        self._top = body.prompt_logprobs
        self._token_ids = bool(body.return_token_ids)

    @property
    def long(self) -> bool:
        """Whether writing the logprobs of the prompts takes long."""
        scored = self._stream.prompt_logprobs.values()
        return sum(len(one) for one in scored) * (1 + (self._stream.params.prompt_logprobs or 0)) >= LONG

    def fields(self, index: int) -> dict[str, Any]:
        """What an answer says of the prompt of an output: nothing, unless it was asked for."""
        found: dict[str, Any] = {}
        if self._top is not None:
            found["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._scored(index), self._top)
        if self._token_ids:
            found["prompt_token_ids"] = self._stream.prompts[index // self._stream.params.n]
        return found

    def _scored(self, index: int) -> list[TokenLogprob | None]:
        return self._stream.prompt_logprobs.get(index, [])


class EchoedPrompts(ShownPrompts):
    """The prompts of completions, which echo them where they were asked to."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stream: RequestStream,
        body: CompletionRequest,
        given: Sequence[str | list[int]],
    ):
        """`given`: the prompts as they are echoed, texts or token ids."""
        super().__init__(tokenizer, stream, body)
        self._given = given
        self._only = body.echo_only
        self._echo_top = body.top_logprobs
        self._as_token_ids = bool(body.return_tokens_as_token_ids)
        self._leading = len(tokenizer.leading_ids) if body.add_special_tokens is not False else 0
        self.echoes = bool(body.echo)

    def text(self, index: int) -> str:
        """The text before output `index`."""
        one = self._given[index // self._stream.params.n]
        return one if isinstance(one, str) else self._tokenizer.decode(one, self._stream.params.skip_special_tokens)

    def logprobs(self, index: int) -> dict[str, Any] | None:
        """The logprobs of that text; None where they aren't asked for."""
        if not self.echoes or self._echo_top is None:
            return None
        number = index // self._stream.params.n
        prompt = self._stream.prompts[number]
        assert isinstance(prompt, list), "a text whose logprobs are asked for was not tokenized"
        text = isinstance(self._given[number], str)
        offsets = TextOffsets(
            self._tokenizer,
            skip_special=not text and self._stream.params.skip_special_tokens,
            hidden=self._leading if text else 0,
        )
        scored, length = at_most(self._scored(index), self._echo_top), len(self.text(index))
        return echoed_logprobs(self._tokenizer, prompt, scored, offsets, length, as_token_ids=self._as_token_ids)

    def cut(self, output: Whole | Delta) -> None:
        """Take the generated token out of an answer that is to show the prompt alone."""
        if not self._only:
            return
        output.token_ids = []
        if isinstance(output, Whole):
            output.texts, output.logprobs = [], []
        else:
            output.text = ""
            output.logprobs = output.logprobs and []
        if output.finish_reason == "stop":
            output.finish_reason, output.stop_reason = "length", None
