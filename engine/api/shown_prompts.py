"""The fields of a response about its prompts: an echo, logprobs of an echo, vLLM's prompt_logprobs, token ids."""

from collections.abc import Sequence
from typing import Any

from engine.api.logprobs import TextOffsets, echoed_logprobs, limit_alternatives, prompt_logprobs
from engine.api.protocol import CompletionRequest, SampledRequest
from engine.frontend.streams import CollectedOutput, Delta, RequestStream, TokenLogprob
from engine.frontend.tokenizer import Tokenizer

LONG = 2048  # from so many logprobs on, a response is rendered on a thread, so that streams continue


class ShownPrompts:
    """The prompts of one request, by output."""

    def __init__(
        self, tokenizer: Tokenizer, stream: RequestStream, body: SampledRequest, prompt_text: str | None = None
    ):
        """`prompt_text` is the prompt as the chat template wrote it, if the response contains it."""
        self._prompt_text = prompt_text
        self._tokenizer = tokenizer
        self._stream = stream
        self._top = body.prompt_logprobs
        self._token_ids = bool(body.return_token_ids)

    @property
    def long(self) -> bool:
        """Whether rendering the logprobs of the prompts takes long."""
        scored = self._stream.prompt_logprobs.values()
        return sum(len(one) for one in scored) * (1 + (self._stream.params.prompt_logprobs or 0)) >= LONG

    def fields(self, index: int) -> dict[str, Any]:
        """The requested fields about the prompt of an output."""
        found: dict[str, Any] = {}
        if self._top is not None:
            found["prompt_logprobs"] = prompt_logprobs(self._tokenizer, self._scored(index), self._top)
        if self._token_ids:
            found["prompt_token_ids"] = self._stream.prompts[index // self._stream.params.n]
        if self._prompt_text is not None:
            found["prompt_text"] = self._prompt_text
        return found

    def _scored(self, index: int) -> list[TokenLogprob | None]:
        return self._stream.prompt_logprobs.get(index, [])


class EchoedPrompts(ShownPrompts):
    """The prompts of a completion, which may be echoed."""

    def __init__(
        self, tokenizer: Tokenizer, stream: RequestStream, body: CompletionRequest, given: Sequence[str | list[int]]
    ):
        """`given`: the prompts to echo, texts or token ids."""
        super().__init__(tokenizer, stream, body)
        self._given = given
        self._only = body.echo_only
        self._echo_top = body.top_logprobs
        self._as_token_ids = bool(body.return_tokens_as_token_ids)
        self._leading = len(tokenizer.leading_ids) if body.add_special_tokens is not False else 0
        self.echoes = bool(body.echo)

    def text(self, index: int) -> str:
        """The text shown before output `index`."""
        one = self._given[index // self._stream.params.n]
        return one if isinstance(one, str) else self._tokenizer.decode(one, self._stream.params.skip_special_tokens)

    def logprobs(self, index: int) -> dict[str, Any] | None:
        """The logprobs of that text; None if they are not requested."""
        if not self.echoes or self._echo_top is None:
            return None
        number = index // self._stream.params.n
        prompt = self._stream.prompts[number]
        assert isinstance(prompt, list), "a prompt with logprobs was not tokenized"
        text = isinstance(self._given[number], str)
        offsets = TextOffsets(
            self._tokenizer,
            skip_special=not text and self._stream.params.skip_special_tokens,
            hidden=self._leading if text else 0,
        )
        scored, length = limit_alternatives(self._scored(index), self._echo_top), len(self.text(index))
        return echoed_logprobs(self._tokenizer, prompt, scored, offsets, length, as_token_ids=self._as_token_ids)

    def cut(self, output: CollectedOutput | Delta) -> None:
        """Remove the generated token from a response that shall contain the prompt only."""
        if not self._only:
            return
        output.token_ids = []
        if isinstance(output, CollectedOutput):
            output.texts, output.logprobs = [], []
        else:
            output.text = ""
            output.logprobs = output.logprobs and []
        if output.finish_reason == "stop":
            output.finish_reason, output.stop_reason = "length", None
