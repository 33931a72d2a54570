"""The grammars of a core's requests: compiled on threads, kept by their content, advanced by each token."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.grammar_compiler import GrammarCompiler, Vocabulary, error_of
from engine.core.intake import TextRequest
from engine.core.request import Request
from engine.core.slots import Slots
from engine.core.steps import ScheduledStep
from engine.errors import RedlineError, RequestError, cause_of
from engine.grammar import Grammar, encode_masks

log = logging.getLogger("redline.core")

MAX_CACHED = 64  # compiled grammars
MAX_COMPILING = 256  # that wait for a thread
THREADS = 2  # so that a grammar that takes long does not hold up all others

Arrival = Request | TextRequest


def no_vocabulary() -> Vocabulary:
    """In place of a function that loads the vocabulary, where there is none."""
    raise RequestError("this engine has no tokenizer, which structured output needs")


class GrammarManager:
    """Compiles grammars, lets requests wait for theirs, and makes the masks of steps; for the loop's thread."""

    def __init__(self, load: Callable[[], Vocabulary] = no_vocabulary, wake: Callable[[], None] = lambda: None):
        """`load` is called on a thread when the first request has a grammar; `wake` makes the loop turn."""
        self._compiler = GrammarCompiler(load)
        self._wake = wake
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammars")
        self._cache: OrderedDict[Grammar, Future[Any]] = OrderedDict()
        self._parked: dict[int, tuple[Arrival, Future[Any]]] = {}  # with their grammars

    def check(self, kind: str, text: str) -> "Future[str]":
        """Compile a grammar; resolves to why it can't be used, or to an empty text."""
        answer: Future[str] = Future()
        self._compiled(Grammar(kind, text)).add_done_callback(lambda done: answer.set_result(_cause(done)))
        return answer

    def _compiled(self, grammar: Grammar) -> "Future[Any]":
        found = self._cache.get(grammar)
        if found is not None:
            self._cache.move_to_end(grammar)
            return found
        if sum(not one.done() for one in self._cache.values()) >= MAX_COMPILING:
            raise RedlineError("too many grammars wait to be compiled: try again later")
        found = self._cache[grammar] = self._threads.submit(self._compiler.compile, grammar)
        found.add_done_callback(lambda _: self._wake())
        while len(self._cache) > MAX_CACHED and next(iter(self._cache.values())).done():
            self._cache.popitem(last=False)
        return found

    # --------------------------------------------------------------------------------------------------------- parked

    def park(self, arrival: Arrival) -> bool:
        """Make a request wait for its grammar; returns whether it must. Raises RedlineError if too many wait."""
        grammar = arrival.message.grammar
        if grammar is None or (compiled := self._compiled(grammar)).done():
            return False
        self._parked[arrival.handle] = arrival, compiled
        return True

    @property
    def parked(self) -> list[int]:
        """The handles of the requests that wait for their grammars."""
        return list(self._parked)

    def unpark(self, handle: int) -> bool:
        """Drop a waiting request; False if there is none."""
        return self._parked.pop(handle, None) is not None

    def take_ready(self) -> list[Arrival]:
        """Remove and return the requests whose grammars are compiled, or have failed."""
        ready = [arrival for arrival, compiled in self._parked.values() if compiled.done()]
        for one in ready:
            del self._parked[one.handle]
        return ready

    def attach(self, request: Request) -> None:
        """Give a request the matcher of its grammar, which is compiled. Raises RequestError if that has failed."""
        grammar = request.message.grammar
        if grammar is not None:
            request.matcher = self._compiled(grammar).result().deep_copy()

    # ---------------------------------------------------------------------------------------------------------- steps

    def masks(self, slots: Slots, step: ScheduledStep) -> tuple[bytes, list[tuple[Request, str]]]:
        """The masks of the slots that sample in a step; all tokens before it are booked.

        Also returns the requests that can't go on, each with the cause, which is empty if its output is complete.
        """
        same = slots.generation[step.slots] == step.generations
        with_mask, rows, ended = list[int](), list[NDArray[np.int32]](), list[tuple[Request, str]]()
        for slot in step.slots[same & slots.constrained[step.slots]].tolist():
            request = slots.requests[slot]
            assert request is not None, f"slot {slot} has no request"
            row, cause = self._mask(request)
            if row is None:
                ended.append((request, cause))
            else:
                with_mask.append(slot)
                rows.append(row)
        return encode_masks(with_mask, np.stack(rows)) if rows else b"", ended

    def _mask(self, request: Request) -> tuple[NDArray[np.int32] | None, str]:
        matcher, size = request.matcher, self._compiler.vocab_size
        row = np.frombuffer(matcher.compute_bitmask(), np.int32).copy()
        if matcher.is_error():
            if request.message.grammar is not None:
                self._cache.pop(request.message.grammar, None)  # copies share the lexer, whose limit is reached
            return None, f"the output can't be continued by its grammar: {error_of(matcher)}"
        may_end = _take_bit(row, size)
        if may_end:
            for token in request.message.stop_ids:
                if token < size:
                    row.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))
        if row.any():
            return row, ""
        return None, "" if may_end else "no token of the model continues the output as its grammar demands"

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def advance(slots: Slots, at: NDArray[np.intp], counts: NDArray[np.int32] | None, stopped: NDArray[np.bool_]) -> None:
    """Advance the matchers of slots that got a token, and mark in `stopped` those whose output is complete."""
    for index in np.flatnonzero(slots.constrained[at] & ~stopped).tolist():
        if counts is not None and not counts[index]:
            continue
        slot = int(at[index])
        request = slots.requests[slot]
        assert request is not None, f"slot {slot} has no request"
        matcher, token = request.matcher, int(slots.tokens[slot, slots.num_tokens[slot] - 1])
        # A stop id before min_tokens: nothing else could be sampled.
        may_end = token in request.stop_ids and matcher.is_accepting()
        stopped[index] = may_end or (matcher.consume_token(token) and matcher.is_stopped())


def _take_bit(row: NDArray[np.int32], position: int) -> bool:
    """Clear a mask from a bit on; returns whether that bit was set."""
    words, at = row.view(np.uint32), position >> 5
    was_set = bool(words[at] & np.uint32(1 << (position & 31)))
    words[at] &= np.uint32((1 << (position & 31)) - 1)
    words[at + 1 :] = 0
    return was_set


def _cause(done: "Future[Any]") -> str:
    if done.cancelled():
        return "the engine is shutting down"
    error = done.exception()
    if error is not None and not isinstance(error, RequestError):
        log.error("a grammar could not be compiled", exc_info=error)
    return "" if error is None else cause_of(error)
