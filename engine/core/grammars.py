"""The grammars of a core's requests: compiled on threads, kept by their content, advanced by each token."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.core.grammar_compiler import WRONG_TOKEN, GrammarCompiler, Vocabulary, error_of
from engine.core.intake import TextRequest
from engine.core.reasoning_limit import ReasoningLimit
from engine.core.request import Request
from engine.core.slots import Slots
from engine.core.steps import ScheduledStep
from engine.errors import INTERRUPTS, RequestError, cause_of
from engine.grammar import MAX_COMPILING, TOO_MANY, WORD_BITS, Grammar, GrammarCheck, encode_masks
from engine.messages import AddRequest, FinishReason
from engine.reasoning import ReasoningMarks

log = logging.getLogger("redline.core")

MAX_CACHED = 64  # compiled grammars
THREADS = 2  # so that a grammar that takes long does not hold up all others

Arrival = Request | TextRequest
Rule = Grammar | ReasoningMarks  # what the masks of a request follow from


def no_vocabulary() -> Vocabulary:
    """In place of a function that loads the vocabulary, where there is none."""
    raise RequestError("this engine has no tokenizer, which structured output and thinking budgets need")


@dataclass(frozen=True, slots=True)
class _Compiled:
    matcher: Any  # in its initial state; None: the grammar can't be used
    cause: str  # why not
    seconds: float


class Ended(NamedTuple):
    """A request whose grammar allows no further token. cause: empty if its output is complete."""

    request: Request
    reason: FinishReason
    cause: str


class GrammarManager:
    """Compiles grammars, lets requests wait for theirs, and makes the masks of steps; for the loop's thread."""

    def __init__(self, load: Callable[[], Vocabulary] = no_vocabulary, wake: Callable[[], None] = lambda: None):
        """`load` is called on a thread when the first request has a grammar; `wake` makes the loop turn."""
        self._compiler = GrammarCompiler(load)
        self._wake = wake
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="grammars")
        self._cache: OrderedDict[Rule, Future[_Compiled]] = OrderedDict()
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

    def _compile(self, rule: Rule) -> _Compiled:
        """On a thread."""
        began = time.perf_counter()
        matcher: Any = None
        cause = ""
        try:
            if isinstance(rule, Grammar):
                matcher = self._compiler.compile(rule)
            else:
                matcher = ReasoningLimit(rule, self._compiler.vocabulary)
        except INTERRUPTS:
            raise
        except RequestError as error:
            cause = str(error)
        except Exception as error:  # such as one of reading the tokenizer; the requests for this grammar receive it
            log.error("a grammar could not be compiled", exc_info=error)
            cause = cause_of(error)
        return _Compiled(matcher, cause, time.perf_counter() - began)

    def _compiled(self, rule: Rule) -> "Future[_Compiled]":
        found = self._cache.get(rule)
        if found is not None:
            self._cache.move_to_end(rule)
            return found
        if sum(not one.done() for one in self._cache.values()) >= MAX_COMPILING:
            raise RequestError(TOO_MANY)
        found = self._cache[rule] = self._threads.submit(self._compile, rule)
        found.add_done_callback(lambda _: self._wake())
        while len(self._cache) > MAX_CACHED and next(iter(self._cache.values())).done():
            self._cache.popitem(last=False)
        return found

    # --------------------------------------------------------------------------------------------------------- parked

    def park(self, arrival: Arrival) -> bool:
        """Make a request wait for its grammar; returns whether it must. Raises RequestError if too many wait."""
        rule = _rule_of(arrival.message)
        if rule is None or (compiled := self._compiled(rule)).done():
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
        rule = _rule_of(request.message)
        if rule is not None:
            compiled = self._compiled(rule).result()
            if compiled.matcher is None:
                raise RequestError(compiled.cause)
            request.matcher = compiled.matcher.deep_copy()
        if request.message.reasoning is not None:
            request.matcher.begin(request.message.reasoning)

    # ---------------------------------------------------------------------------------------------------------- steps

    def masks(self, slots: Slots, step: ScheduledStep) -> tuple[bytes, list[Ended]]:
        """The masks of the slots that sample in a step; all tokens before it are booked.

        Also returns the requests that can't go on.
        """
        same = slots.generation[step.slots] == step.generations
        constrained = step.slots[same & slots.constrained[step.slots]].tolist()
        words = np.empty((len(constrained), self._compiler.mask_words), np.int32)
        address, row_bytes = words.ctypes.data, words.strides[0]
        requests = [slots.requests[slot] for slot in constrained]
        for number, request in enumerate(requests):
            assert request is not None, f"slot {constrained[number]} has no request"
            request.matcher.unsafe_compute_mask_ptr(address + number * row_bytes, row_bytes)
        may_end = _take_bits(words, self._compiler.vocab_size)
        _allow_stop_ids(words, np.flatnonzero(may_end), requests, self._compiler.vocab_size)
        usable = set(np.flatnonzero(words.any(axis=1)).tolist())
        kept, ended = list[int](), list[Ended]()
        for number, request in enumerate(requests):
            assert request is not None
            if request.matcher.is_error():
                ended.append(self._end_failed(request))
            elif number not in usable:
                ended.append(_end_without_tokens(request, complete=bool(may_end[number])))
            else:
                kept.append(number)
        if not kept:
            return b"", ended
        return encode_masks([constrained[number] for number in kept], words[kept] if ended else words), ended

    def _end_failed(self, request: Request) -> Ended:
        if request.message.grammar is not None:
            self._cache.pop(request.message.grammar, None)  # copies share the lexer, whose limit is reached
        return Ended(request, *failure_of(request.matcher))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def advance(
    slots: Slots, at: NDArray[np.intp], counts: NDArray[np.int32] | None, stopped: NDArray[np.bool_]
) -> dict[int, tuple[FinishReason, str]]:
    """Advance the matchers of slots that got a token, and mark in `stopped` those whose output is complete.

    Returns why outputs can't go on, by index into `at`.
    """
    failed: dict[int, tuple[FinishReason, str]] = {}
    for index in np.flatnonzero(slots.constrained[at] & ~stopped).tolist():
        if counts is not None and not counts[index]:
            continue
        slot = int(at[index])
        request = slots.requests[slot]
        assert request is not None, f"slot {slot} has no request"
        matcher, token = request.matcher, int(slots.tokens[slot, slots.num_tokens[slot] - 1])
        # A stop id before min_tokens: nothing else could be sampled.
        if token in request.stop_ids and matcher.is_accepting():
            stopped[index] = True
        elif matcher.consume_token(token):
            stopped[index] = matcher.is_stopped()
            if isinstance(matcher, ReasoningLimit) and matcher.is_over:
                request.matcher, slots.constrained[slot] = None, False  # the rest of the output is free
        else:
            failed[index] = failure_of(matcher)
    return failed


def _rule_of(message: AddRequest) -> Rule | None:
    return message.grammar if message.reasoning is None else message.reasoning.marks


def failure_of(matcher: Any) -> tuple[FinishReason, str]:
    """Why a matcher can't go on: its grammar reached a limit of the library, or the engine sampled a wrong token."""
    cause = error_of(matcher)
    if WRONG_TOKEN in cause:
        return FinishReason.FAILED, f"the engine sampled a token that the grammar excludes: {cause}"
    return FinishReason.ERROR, f"the output can't be continued by its grammar: {cause}"


def _end_without_tokens(request: Request, *, complete: bool) -> Ended:
    if complete:
        return Ended(request, FinishReason.STOP, "")
    cause = "no token of the model continues the output as its grammar demands"
    return Ended(request, FinishReason.ERROR, cause)


def _take_bits(words: NDArray[np.int32], position: int) -> NDArray[np.bool_]:
    """Clear each mask from a bit on; returns whether that bit was set."""
    at, bit = divmod(position, WORD_BITS)
    unsigned = words.view(np.uint32)
    was_set = unsigned[:, at] >> np.uint32(bit) & np.uint32(1)
    unsigned[:, at] &= np.uint32((1 << bit) - 1)
    unsigned[:, at + 1 :] = 0
    return was_set.astype(np.bool_)


def _allow_stop_ids(words: NDArray[np.int32], rows: NDArray[np.intp], requests: Sequence[Any], size: int) -> None:
    """Set the bits of the stop ids of requests whose outputs may end."""
    unsigned = words.view(np.uint32)
    for row in rows.tolist():
        for token in requests[row].message.stop_ids:
            if token < size:
                unsigned[row, token // WORD_BITS] |= np.uint32(1 << token % WORD_BITS)


def _answer(done: "Future[_Compiled]", *, was_known: bool) -> GrammarCheck:
    if done.cancelled():
        return GrammarCheck("the engine is shutting down", -1.0)
    compiled = done.result()
    return GrammarCheck(compiled.cause, -1.0 if was_known else compiled.seconds)
