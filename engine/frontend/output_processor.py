"""Turns the messages of a core into outputs of a front end: tokens become text, and streams end.

A failure over one request, for example in its detokenizer, ends that request with its cause. The other requests of the
same message are not affected.
"""

import logging
from collections.abc import Sequence

from engine.clock import Clock
from engine.columns import float32s, int32s, int64s
from engine.errors import (
    INTERRUPTS,
    EngineDeadError,
    NotServedError,
    ProcessingError,
    RedlineError,
    RequestError,
    cause_of,
)
from engine.frontend.feature_cache import FeatureCache, placed_inputs
from engine.frontend.front_end_stats import FrontEndStats
from engine.frontend.listener import ClientListener, OutputRecord
from engine.frontend.streams import Output, RequestStream, TokenLogprob
from engine.frontend.transport import Transport
from engine.logprob_columns import PromptLogprobs, TokenLogprobs
from engine.messages import Abort, Finished, FinishReason, Outputs
from engine.pooling import Pooled

log = logging.getLogger("redline.client")

# Other reasons are errors.
REASON_NAMES: dict[int, str] = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORT: "abort"}
_FAILURES = (FinishReason.FAILED, FinishReason.NOT_ENCODED)  # after which the core needs the inputs anew


class OutputProcessor:
    """The live outputs of one front end of one core; lives in one event loop."""

    features: FeatureCache | None = None  # of multimodal inputs, if the model takes any

    def __init__(self, transport: Transport, clock: Clock, stats: FrontEndStats, front_end: int, replica: int):
        """`front_end` and `replica` are numbers: of the API process, and of the core among several."""
        self.clock = clock
        self.stats = stats
        self.replica = replica
        self.dead: str | None = None  # the cause, once the core is gone
        self.listener = ClientListener()
        self.touched: list[RequestStream] = []  # streams with new deltas from the message being processed
        self._transport = transport
        self._front_end = front_end
        self._live: dict[int, Output] = {}  # by handle
        # Outputs that ended here before the core reported their end; their records wait for its report. The second is
        # when the request arrived.
        self._unreported: dict[int, tuple[OutputRecord, float]] = {}

    def abort(self, stream: RequestStream) -> None:
        """End all outputs of a stream that still run; its reader gets no more of them."""
        handles = tuple(stream.live)
        for handle in handles:
            self._remove(stream.live[handle], "abort")
        stream.wake()
        if handles and self.dead is None:
            self._transport.send(Abort(handles))

    def streams(self) -> list[RequestStream]:
        """The streams with live outputs."""
        return list({id(output.stream): output.stream for output in self._live.values()}.values())

    def end_streams(self, error: Exception) -> int:
        """Fail all streams, here and in the core, which lives on; returns the number of their outputs."""
        count = len(self._live)
        for stream in self.streams():
            self._fail_stream(stream, error)
        return count

    def _process(self, message: Outputs) -> None:
        if message.stats is not None:
            self.stats.record_core(message.at, message.stats)
        for admitted in message.admitted:
            output = self._live.get(admitted.handle)
            if output is not None:
                output.cached_tokens = output.stream.cached_tokens[output.prompt] = admitted.cached_tokens
                output.waited_s = max(0.0, admitted.waited_s)
                output.was_admitted = True
                if admitted.prompt_tokens:
                    output.stream.prompt_lengths[output.prompt] = admitted.prompt_tokens
                self.stats.queue.observe(output.waited_s)
        finished = {one.handle: one for one in message.finished}
        self._process_vectors(message.pooled)
        self._process_prompt_logprobs(message.prompt_logprobs)
        if message.handles:
            self._process_tokens(message, finished)
        for one in finished.values():
            output = self._live.get(one.handle)
            if output is not None:
                try:
                    self._finish(output, one)
                except INTERRUPTS:
                    raise
                except BaseException as error:
                    self._fail(output, error, one)
            elif (unreported := self._unreported.pop(one.handle, None)) is not None:
                record, arrived = unreported
                record.complete(one, arrived)
                self._report(record)
        for stream in self.touched:
            stream.flush()
        self.touched.clear()

    def _process_vectors(self, pooled: Sequence[Pooled]) -> None:
        for one in pooled:
            output = self._live.get(one.handle)
            if output is not None:
                output.stream.vectors[output.index] = one.vector

    def _process_prompt_logprobs(self, scored: Sequence[PromptLogprobs]) -> None:
        """Keep the logprobs of prompt tokens. After a preemption they arrive again and are skipped."""
        for one in scored:
            output = self._live.get(one.owner)
            if output is None:
                continue
            known, entries = output.prompt_logprobs, _LogprobColumns(one.logprobs)
            for position in int32s(one.logprobs.index).tolist():
                if position == len(known):
                    known.append(entries.at(position, output.stream.params.prompt_logprobs))

    def _process_tokens(self, message: Outputs, finished: dict[int, Finished]) -> None:
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
                        logprob = logprobs.at(index, output.top) if logprobs is not None else None
                        if texts is not None:
                            output.add_token(tokens[index], texts[position] if index == begin else "", logprob)
                            continue
                        is_stop = ending is not None and ending.stop_id >= 0 and index == end - 1
                        if self._add_token(output, tokens[index], logprob, is_stop):
                            if ending is None:  # otherwise the core has ended it already
                                self._transport.send(Abort((handle,)))
                            break
                except INTERRUPTS:
                    raise
                except BaseException as error:
                    self._fail(output, error, ending)
            begin = end

    def _add_token(self, output: Output, token: int, logprob: TokenLogprob | None, is_stop: bool) -> bool:
        """Add one token to an output; True if it completed a stop string, which ends the output here."""
        if is_stop and not output.include_stop:
            output.add_token(token, "", logprob)
            return False
        assert output.detokenizer is not None, "the core detokenizes this request"
        text, stop = output.detokenizer.push(token)
        output.add_token(token, text, logprob)
        if stop is None:
            return False
        output.finish("stop", stop, "")
        self._remove(output, "stop")
        return True

    def _finish(self, output: Output, finished: Finished) -> None:
        """End an output that the core has ended."""
        reason = REASON_NAMES.get(finished.reason, "error")
        if reason == "error":
            if output.stream.inputs and self.features is not None and finished.reason in _FAILURES:
                self.features.send_again(self.replica, placed_inputs(output.stream.inputs[output.prompt]))
            output.stream.fail(_error_of(finished))
            self._remove(output, reason, finished)
            self.abort(output.stream)
            return
        stop: int | str | None = finished.stop or None
        if finished.stop_id in output.user_stop_ids:
            stop = finished.stop_id
        output.finish(reason, stop, finished.text if output.detokenizer is None else output.detokenizer.finish())
        self._remove(output, reason, finished)

    def _fail(self, output: Output, error: BaseException, finished: Finished | None) -> None:
        """End the stream of an output that this process could not handle.

        `finished` is the core's report of the output's end, if it was in the same message.
        """
        log.error("request %s failed", output.stream.origin.request or output.handle, exc_info=error)
        failure = RedlineError(f"the server could not produce this request's text: {cause_of(error)}")
        if finished is not None and output.handle in self._live:
            self._remove(output, "error", finished)
        self._fail_stream(output.stream, failure)

    def _fail_stream(self, stream: RequestStream, error: Exception) -> None:
        """End a stream with an error, here and in the core."""
        stream.fail(error)
        handles = tuple(stream.live)
        for handle in handles:
            self._remove(stream.live[handle], "error")
        if handles and self.dead is None:
            self._transport.send(Abort(handles))

    def _remove(self, output: Output, reason: str, finished: Finished | None = None) -> None:
        """Remove and count an output that ended; `finished` is the core's report, if that came first."""
        del self._live[output.handle]
        del output.stream.live[output.handle]
        if output.stream.inputs and not output.stream.live:
            output.stream.release_inputs()
        stats, now = self.stats, self.clock.now()
        stats.live = len(self._live)
        stats.count_finished(reason)
        if reason in ("stop", "length"):
            stats.e2e.observe(now - output.stream.arrived)
            stats.prompt_tokens.observe(output.stream.prompt_lengths[output.prompt])
            stats.generation_tokens.observe(output.count)
        self.listener.output_ended(output, reason)
        if not self.listener.wants_records:
            return
        record = OutputRecord.of_output(output, reason, now, self._front_end, self.replica)
        if finished is not None:
            record.complete(finished, output.stream.arrived)
            record.error = finished.error or None
            self._report(record)
        elif self.dead is not None:
            record.error = self.dead
            self._report(record)
        else:
            record.error = str(output.stream.error) if reason == "error" else None
            self._unreported[output.handle] = record, output.stream.arrived

    def _report(self, record: OutputRecord) -> None:
        try:
            self.listener.output_recorded(record)
        except Exception:  # the output has ended all the same
            log.exception("the end of a request could not be reported")


def _error_of(finished: Finished) -> RedlineError:
    cause = finished.error or "the engine could not serve this request"
    if finished.reason == FinishReason.NOT_SERVED:
        return NotServedError(cause, "model")
    if finished.reason == FinishReason.SHUT_DOWN:
        return EngineDeadError(cause)
    if finished.reason == FinishReason.NOT_ENCODED:
        return ProcessingError(cause)
    return RequestError(cause) if finished.reason == FinishReason.ERROR else RedlineError(cause)


class _LogprobColumns:
    """The logprobs of one message, by the position of their token."""

    def __init__(self, columns: TokenLogprobs):
        self._ids = int32s(columns.ids).reshape(-1, columns.width).tolist()
        self._values = float32s(columns.values).reshape(-1, columns.width).tolist()
        self._ranks = int32s(columns.ranks).tolist()
        self._entry = {position: entry for entry, position in enumerate(int32s(columns.index).tolist())}

    def at(self, position: int, top: int | None) -> TokenLogprob | None:
        """The logprob of the token at a position, with `top` alternatives; None if it has none."""
        entry = self._entry.get(position)
        if entry is None or top is None:
            return None
        ids, values = self._ids[entry], self._values[entry]
        alternatives = tuple(zip(ids[1 : top + 1], values[1 : top + 1], strict=True))
        return TokenLogprob(ids[0], values[0], self._ranks[entry], alternatives)
