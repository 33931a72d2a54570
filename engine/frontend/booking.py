"""What the messages of a core mean for the requests of a front end: tokens become text, and streams end.

A failure over one request, in its detokenizer or wherever else, ends that request with its cause: the others of the
message get what is theirs.
"""

import logging
from collections.abc import Callable, Sequence

from engine.clock import Clock
from engine.errors import INTERRUPTS, EngineDeadError, NotServedError, RedlineError, RequestError, cause_of
from engine.frontend.logs import Ended
from engine.frontend.stats import FrontEndStats
from engine.frontend.streams import REASONS, Output, RequestStream, TokenLogprob
from engine.frontend.transport import Transport
from engine.messages import (
    Abort,
    Finished,
    FinishReason,
    Outputs,
    PromptLogprobs,
    TokenLogprobs,
    float32s,
    int32s,
    int64s,
)

log = logging.getLogger("redline.client")


class Booking:
    """The outputs under way of one front end of one core; lives in one event loop."""

    def __init__(self, transport: Transport, clock: Clock, stats: FrontEndStats, front_end: int):
        self.clock = clock
        self.stats = stats
        self.dead: str | None = None  # the cause, once the core is gone
        self.on_ended: Callable[[Ended], None] | None = None
        self.touched: list[RequestStream] = []  # by the message that is being booked
        self._transport = transport
        self._front_end = front_end
        self._live: dict[int, Output] = {}  # by handle
        self._ended: dict[int, Ended] = {}  # ended here; the core's last word is still to come

    def abort(self, stream: RequestStream) -> None:
        """End all outputs of a stream that still run; its reader gets no more of them."""
        handles = tuple(stream.live)
        for handle in handles:
            self._drop(stream.live[handle], "abort")
        stream.wake()
        if handles and self.dead is None:
            self._transport.send(Abort(handles))

    def _take(self, message: Outputs) -> None:
        if message.stats is not None:
            self.stats.take_core(message.at, message.stats)
        for admitted in message.admitted:
            output = self._live.get(admitted.handle)
            if output is not None:
                output.cached_tokens = output.stream.cached_tokens[output.prompt] = admitted.cached_tokens
                output.waited_s = max(0.0, admitted.waited_s)
                if admitted.prompt_tokens:
                    output.stream.prompt_lengths[output.prompt] = admitted.prompt_tokens
                self.stats.queue.observe(output.waited_s)
        finished = {one.handle: one for one in message.finished}
        self._take_prompts(message.prompt_logprobs)
        if message.handles:
            self._take_tokens(message, finished)
        for one in finished.values():
            output = self._live.get(one.handle)
            if output is not None:
                try:
                    self._end(output, one)
                except INTERRUPTS:
                    raise
                except BaseException as error:
                    self._fail(output, error, one)
            elif (ended := self._ended.pop(one.handle, None)) is not None:
                ended.preemptions = one.preemptions
                self._tell(ended)
        for stream in self.touched:
            stream.flush()
        self.touched.clear()

    def _take_prompts(self, scored: Sequence[PromptLogprobs]) -> None:
        """Keep the logprobs of prompt tokens; those that come again after a preemption are known already."""
        for one in scored:
            output = self._live.get(one.owner)
            if output is None:
                continue
            known, entries = output.prompt_logprobs, _LogprobColumns(one.logprobs)
            for position in int32s(one.logprobs.index).tolist():
                if position == len(known):
                    known.append(entries.of(position, output.stream.params.prompt_logprobs))

    def _take_tokens(self, message: Outputs, finished: dict[int, Finished]) -> None:
        at, now = message.at, self.clock.now()
        live, stats, texts = self._live, self.stats, message.texts
        tokens = int32s(message.tokens).tolist()
        counts = int32s(message.counts).tolist() if message.counts else None
        logprobs = _LogprobColumns(message.logprobs) if message.logprobs is not None else None
        begin = 0
        for position, handle in enumerate(int64s(message.handles).tolist()):
            end = begin + (1 if counts is None else counts[position])
            output = live.get(handle)
            if output is not None and end > begin:
                if output.count:
                    stats.itl.observe(at - output.last_at)
                else:
                    output.first_at = at
                    output.ttft_s = now - output.stream.arrived
                    stats.ttft.observe(output.ttft_s)
                output.last_at = at
                ending = finished.get(handle) if finished else None
                try:
                    for index in range(begin, end):
                        logprob = logprobs.of(index, output.top) if logprobs is not None else None
                        if texts is not None:
                            output.add(tokens[index], texts[position] if index == begin else "", logprob)
                            continue
                        is_stop = ending is not None and ending.stop_id >= 0 and index == end - 1
                        if self._add_token(output, tokens[index], logprob, is_stop):
                            if ending is None:  # else the core has ended it by itself
                                self._transport.send(Abort((handle,)))
                            break
                except INTERRUPTS:
                    raise
                except BaseException as error:
                    self._fail(output, error, ending)
            begin = end

    def _add_token(self, output: Output, token: int, logprob: TokenLogprob | None, is_stop: bool) -> bool:
        """Add one token to an output; True if that completed a stop string, which ends it here."""
        if is_stop and not output.include_stop:
            output.add(token, "", logprob)
            return False
        assert output.detokenizer is not None, "the core writes the texts of this request"
        text, stop = output.detokenizer.push(token)
        output.add(token, text, logprob)
        if stop is None:
            return False
        output.finish("stop", stop, "")
        self._drop(output, "stop")
        return True

    def _end(self, output: Output, finished: Finished) -> None:
        """The core ended an output."""
        reason = REASONS[FinishReason(finished.reason)]
        if reason == "error":
            output.stream.fail(_error_of(finished))
            self._drop(output, reason, finished)
            self.abort(output.stream)
            return
        stop: int | str | None = finished.stop or None
        if finished.stop_id in output.user_stop_ids:
            stop = finished.stop_id
        output.finish(reason, stop, finished.text if output.detokenizer is None else output.detokenizer.finish())
        self._drop(output, reason, finished)

    def _fail(self, output: Output, error: BaseException, finished: Finished | None) -> None:
        """The front end itself failed over an output: its stream ends with that, and nobody else's.

        `finished` is the core's word on the output, if it came with what failed.
        """
        log.error("request %s failed", output.stream.origin.request or output.handle, exc_info=error)
        failure = RedlineError(f"the server could not write this request's text: {cause_of(error)}")
        if finished is not None and output.handle in self._live:
            self._drop(output, "error", finished)
        self._fail_stream(output.stream, failure)

    def _fail_stream(self, stream: RequestStream, error: Exception) -> None:
        """End a stream with an error, here and in the core."""
        stream.fail(error)
        handles = tuple(stream.live)
        for handle in handles:
            self._drop(stream.live[handle], "error")
        if handles and self.dead is None:
            self._transport.send(Abort(handles))

    def _drop(self, output: Output, reason: str, finished: Finished | None = None) -> None:
        """Forget an output that is over, and count it; `finished` is the core's word, if that came first."""
        del self._live[output.handle]
        del output.stream.live[output.handle]
        stats, now = self.stats, self.clock.now()
        stats.live = len(self._live)
        stats.count_finished(reason)
        if reason in ("stop", "length"):
            stats.e2e.observe(now - output.stream.arrived)
            stats.prompt_tokens.observe(output.stream.prompt_lengths[output.prompt])
            stats.generation_tokens.observe(output.count)
        if self.on_ended is None:
            return
        ended = Ended.of(output, reason, now, self._front_end)
        if finished is not None:
            ended.preemptions, ended.error = finished.preemptions, finished.error or None
            self._tell(ended)
        elif self.dead is not None:
            ended.error = self.dead
            self._tell(ended)
        else:
            self._ended[output.handle] = ended

    def _tell(self, ended: Ended) -> None:
        if self.on_ended is not None:
            try:
                self.on_ended(ended)
            except Exception:  # it only reports: the request is over all the same
                log.exception("the end of a request could not be reported")


def _error_of(finished: Finished) -> RedlineError:
    cause = finished.error or "the engine could not serve this request"
    if finished.reason == FinishReason.NOT_SERVED:
        return NotServedError(cause, "model")
    if finished.reason == FinishReason.SHUT_DOWN:
        return EngineDeadError(cause)
    return RequestError(cause) if finished.reason == FinishReason.ERROR else RedlineError(cause)


class _LogprobColumns:
    """The logprobs of one message, by the position of their token."""

    def __init__(self, columns: TokenLogprobs):
        self._ids = int32s(columns.ids).reshape(-1, columns.width).tolist()
        self._values = float32s(columns.values).reshape(-1, columns.width).tolist()
        self._ranks = int32s(columns.ranks).tolist()
        self._entry = {position: entry for entry, position in enumerate(int32s(columns.index).tolist())}

    def of(self, position: int, top: int | None) -> TokenLogprob | None:
        entry = self._entry.get(position)
        if entry is None or top is None:
            return None
        ids, values = self._ids[entry], self._values[entry]
        alternatives = tuple(zip(ids[1 : top + 1], values[1 : top + 1], strict=True))
        return TokenLogprob(ids[0], values[0], self._ranks[entry], alternatives)
