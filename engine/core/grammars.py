"""The grammars of a core's requests: compiled on threads, kept by their content, advanced by each token."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.grammar_compiler import GrammarCompiler, Vocabulary, error_of
from engine.core.intake import TextRequest
from engine.core.request import Request
from engine.core.slots import Slots
from engine.core.steps import ScheduledStep
from engine.errors import INTERRUPTS, RequestError, cause_of
from engine.grammar import MAX_COMPILING, TOO_MANY, Grammar, GrammarCheck, encode_masks

log = logging.getLogger("redline.core")

MAX_CACHED = 64  # compiled grammars
THREADS = 2  # so that a grammar that takes long does not hold up all others

Arrival = Request | TextRequest


def no_vocabulary() -> Vocabulary:
    """In place of a function that loads the vocabulary, where there is none."""
    raise RequestError("this engine has no tokenizer, which structured output needs")


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: Any  # in its initial state; None: the grammar can't be used
    cause: str  # why not
    seconds: float


class GrammarManager:
    """Compiles grammars, lets requests wait for theirs, and makes the masks of steps; for the loop's thread."""

    def __init__(self, load: Callable[[], Vocabulary] = no_vocabulary, wake: Callable[[], None] = lambda: None):
        """`load` is called on a thread when the first request has a grammar; `wake` makes the loop turn."""
        self._compiler = GrammarCompiler(load)
        self._wake = wake
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammars")
        self._cache: OrderedDict[Grammar, Future[_Compiled]] = OrderedDict()
        self._parked: dict[int, tuple[Arrival, Future[_Compiled]]] = {}  # with their grammars

    def check(self, kind: str, text: str) -> "Future[GrammarCheck]":
        """Compile a grammar, and say whether it can be used."""
        grammar, answer = Grammar(kind, text), Future[GrammarCheck]()
        was_known = grammar in self._cache
        try:
            compiled = self._compiled(grammar)
        except RequestError as error:
            answer.set_result(GrammarCheck(str(error), -1.0))
        else:
            compiled.add_done_callback(lambda done: answer.set_result(_answer(done, was_known=was_known)))
        return answer

    def _compile(self, grammar: Grammar) -> _Compiled:
        """On a thread."""
        began = time.perf_counter()
        matcher, cause = None, ""
        try:
            matcher = self._compiler.compile(grammar)
        except INTERRUPTS:
            raise
        except RequestError as error:
            cause = str(error)
        except Exception as error:  # such as one of reading the tokenizer; the requests for this grammar receive it
            log.error("a grammar could not be compiled", exc_info=error)
            cause = cause_of(error)
        return _Compiled(matcher, cause, time.perf_counter() - began)

    def _compiled(self, grammar: Grammar) -> "Future[_Compiled]":
        found = self._cache.get(grammar)
        if found is not None:
            self._cache.move_to_end(grammar)
            return found
        if sum(not one.done() for one in self._cache.values()) >= MAX_COMPILING:
            raise RequestError(TOO_MANY)
        found = self._cache[grammar] = self._threads.submit(self._compile, grammar)
        found.add_done_callback(lambda _: self._wake())
        while len(self._cache) > MAX_CACHED and next(iter(self._cache.values())).done():
            self._cache.popitem(last=False)
        return found

    # --------------------------------------------------------------------------------------------------------- parked

    def park(self, arrival: Arrival) -> bool:
        """Make a request wait for its grammar; returns whether it must. Raises RequestError if too many wait."""
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
            compiled = self._compiled(grammar).result()
            if compiled.matcher is None:
                raise RequestError(compiled.cause)
            request.matcher = compiled.matcher.deep_copy()

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


def _answer(done: "Future[_Compiled]", *, was_known: bool) -> GrammarCheck:
    if done.cancelled():
        return GrammarCheck("the engine is shutting down", -1.0)
    compiled = done.result()
    return GrammarCheck(compiled.cause, -1.0 if was_known else compiled.seconds)
