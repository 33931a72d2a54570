"""Tokenizing and detokenizing within the core's loop, as in V0 (`--ablate inline-frontend`).

Implements `engine.core.protocols.InlineFrontEnd`. The front-end process then only passes texts on. A failure over one
request ends that request with its cause.
"""

import logging
from dataclasses import dataclass

import msgspec
import numpy as np

from engine.columns import column, int32s, int64s
from engine.errors import INTERRUPTS, cause_of
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.inline_inputs import InlineInputs
from engine.frontend.prompts import check_prompt
from engine.frontend.tokenizer import Tokenizer
from engine.logprob_columns import select_logprobs
from engine.messages import AddRequest, Admitted, Finished, FinishReason, MMInputRef, Outputs

log = logging.getLogger("redline.core")

replace = msgspec.structs.replace


@dataclass(slots=True)
class _LiveRequest:
    """A request that runs."""

    detokenizer: Detokenizer
    include_stop: bool
    prompt_tokens: int
    stop: str = ""  # the stop string that ended it
    error: str = ""  # why it can't be detokenized


class InlineTexts:
    """Tokenizes and detokenizes the requests of one core; for one thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        max_model_len: int,
        vocab_size: int,
        inputs: InlineInputs | None = None,
        *,
        detokenizes: bool = True,
    ):
        """`inputs` are the multimodal inputs, if the model takes any. Without `detokenizes` only they are handled."""
        self.detokenizes = detokenizes
        self._inputs = inputs
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._live: dict[int, _LiveRequest] = {}

    def add(self, message: AddRequest) -> AddRequest:
        """The message with its text tokenized and its multimodal inputs in their places.

        Raises RequestError if the model can't serve the prompt.
        """
        if message.prompt and not message.unplaced:
            prompt = int32s(message.prompt).tolist()
        else:
            prompt, mm_inputs = self._encode(message)
            check_prompt(prompt, self._max_model_len, self._vocab_size)
            # The front end did not know how many tokens the text has.
            max_tokens = min(message.max_tokens, self._max_model_len - len(prompt))
            min_tokens = min(message.min_tokens, max_tokens)
            sampling = message.sampling
            if sampling.min_tokens > min_tokens:
                sampling = replace(sampling, min_tokens=min_tokens)
            message = replace(
                message,
                prompt=column(prompt),
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                sampling=sampling,
                mm_inputs=mm_inputs,
                unplaced=(),
            )
        writing = message.text_options
        if writing is not None:
            detokenizer = Detokenizer(
                self._tokenizer,
                prompt,
                stop=writing.stops,
                include_stop=writing.include_stop,
                skip_special_tokens=writing.skip_special_tokens,
                visible_ids=writing.visible_ids,
                min_tokens=message.min_tokens,
            )
            self._live[message.handle] = _LiveRequest(detokenizer, writing.include_stop, len(prompt))
        return message

    def process(self, message: AddRequest) -> AddRequest:
        """The message with its multimodal inputs processed; raises RequestError if one can't be."""
        return message if self._inputs is None else self._inputs.process(message)

    def _encode(self, message: AddRequest) -> tuple[list[int], tuple[MMInputRef, ...]]:
        """The final prompt of a message, and its multimodal inputs in their places."""

        def encode(text: str) -> list[int]:
            return self._tokenizer.encode_prompt(text, message.add_special_tokens, self._max_model_len)

        if message.unplaced:
            assert self._inputs is not None, "the model takes no multimodal inputs"
            return self._inputs.place(message, encode)
        return encode(message.text), message.mm_inputs

    def outputs(self, outputs: Outputs) -> tuple[Outputs, tuple[int, ...]]:
        """Detokenize outputs.

        Returns the outputs with texts, and the requests that a stop string or a failure ended, which the core must
        abort. Tokens after a stop string are left out, and `finished` already has the end of such a request.
        """
        admitted = tuple(map(self._admitted, outputs.admitted))
        stopped: list[int] = []
        if outputs.handles:
            outputs, stopped = self._write(outputs)
        finished = [self._finished(one) for one in outputs.finished]
        finished += [self._finished(Finished(handle, FinishReason.STOP)) for handle in stopped]
        return replace(outputs, admitted=admitted, finished=tuple(finished)), tuple(stopped)

    def _admitted(self, admitted: Admitted) -> Admitted:
        request = self._live.get(admitted.handle)
        return admitted if request is None else replace(admitted, prompt_tokens=request.prompt_tokens)

    def _write(self, outputs: Outputs) -> tuple[Outputs, list[int]]:
        """Add the texts; also returns the requests that end here and that the core has not ended."""
        ending = {one.handle: one for one in outputs.finished}
        handles = int64s(outputs.handles).tolist()
        tokens = int32s(outputs.tokens).tolist()
        counts = int32s(outputs.counts).tolist() if outputs.counts else [1] * len(handles)
        texts: list[str] = []
        used: list[int] = []  # of each handle, the tokens that are kept
        stopped: list[int] = []
        begin = 0
        for handle, count in zip(handles, counts, strict=True):
            request, text, kept = self._live.get(handle), "", count
            if request is not None:
                last = ending.get(handle)
                try:
                    text, kept = _push(request, tokens[begin : begin + count], last)
                except INTERRUPTS:
                    raise
                except BaseException as error:
                    text, kept = "", 0
                    request.error = _failure(handle, error)
                if (request.stop or request.error) and last is None:
                    stopped.append(handle)
            texts.append(text)
            used.append(kept)
            begin += count
        if used == counts:
            return replace(outputs, texts=tuple(texts)), stopped
        return _cut(outputs, counts, used, tuple(texts)), stopped

    def _finished(self, finished: Finished) -> Finished:
        request = self._live.pop(finished.handle, None)
        if request is None or finished.error:
            return finished
        if request.stop:
            return replace(finished, reason=int(FinishReason.STOP), stop_id=-1, stop=request.stop)
        text = ""
        if not request.error:
            try:
                text = request.detokenizer.finish()
            except INTERRUPTS:
                raise
            except BaseException as error:
                request.error = _failure(finished.handle, error)
        if request.error:
            return replace(finished, reason=int(FinishReason.FAILED), stop_id=-1, error=request.error)
        return replace(finished, text=text)


def _failure(handle: int, error: BaseException) -> str:
    log.error("the text of request %d could not be written", handle, exc_info=error)
    return f"the server could not produce this request's text: {cause_of(error)}"


def _push(request: _LiveRequest, tokens: list[int], last: Finished | None) -> tuple[str, int]:
    """Detokenize tokens; returns the text, and the number of tokens up to a stop string."""
    text = ""
    for index, token in enumerate(tokens):
        ends_it = last is not None and last.stop_id >= 0 and index == len(tokens) - 1
        if ends_it and not request.include_stop:
            continue
        part, stop = request.detokenizer.push(token)
        text += part
        if stop is not None:
            request.stop = stop
            return text, index + 1
    return text, len(tokens)


def _cut(outputs: Outputs, counts: list[int], used: list[int], texts: tuple[str, ...]) -> Outputs:
    """Keep the first `used` of the `counts` tokens of each handle."""
    kept = np.concatenate([np.arange(count) < some for count, some in zip(counts, used, strict=True)])
    logprobs = select_logprobs(outputs.logprobs, kept) if outputs.logprobs is not None else None
    return replace(
        outputs, tokens=column(int32s(outputs.tokens)[kept]), counts=column(used), texts=texts, logprobs=logprobs
    )
