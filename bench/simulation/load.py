"""Sends the requests of one load point to a simulated server, and lets virtual time pass until it is over."""

import math
from collections.abc import Callable

import numpy as np

from bench.errors import BenchError
from bench.loadgen import Observer
from bench.simulation.prompts import images_of, prompt_ids
from bench.simulation.recording import SentRequest, SimulatedRecording
from bench.target.metrics import SCRAPE_EVERY_S
from bench.workloads.base import RequestSpec
from engine.errors import ConfigError
from engine.hardware.simulation import Simulation

TICK_S = 0.2  # between two calls of the observer, as in the load generator


class VirtualLoad:
    """One load point; `run_open` or `run_closed` is called once.

    Args:
        simulation: the server.
        specs: the requests.
        observer: called every TICK_S; may end the load.
        time_limit_s: limit of the load, from now.
        needed: the load ends once this many first requests have ended.
        read: takes a reading of the counters, called every SCRAPE_EVERY_S.
    """

    def __init__(
        self,
        simulation: Simulation,
        specs: list[RequestSpec],
        observer: Observer,
        time_limit_s: float,
        needed: int,
        read: Callable[[], object],
    ):
        self._simulation, self._specs, self._observer, self._read = simulation, specs, observer, read
        self._start_s = simulation.now()
        self._limit_s = self._start_s + time_limit_s
        self._needed = self._awaited = needed
        self._sent: list[SentRequest] = []
        self._open: dict[int, SentRequest] = {}  # by handle
        self._finished = self._failed = 0
        self._ticks = self._readings = 0  # so far, on the grids of their periods

    def run_open(self, times: np.ndarray) -> SimulatedRecording:
        """Send specs[i] at times[i], in seconds from now."""
        due_s = [*(self._start_s + np.asarray(times, np.float64)).tolist(), math.inf]
        while self._awaited > 0:
            while due_s[len(self._sent)] <= self._simulation.now():
                self._send()
            if not self._watch():
                break
            self._pass_time(due_s[len(self._sent)])
        return self._end()

    def run_closed(self, concurrency: int) -> SimulatedRecording:
        """Keep `concurrency` requests open until all are done."""
        for _ in range(min(concurrency, len(self._specs))):
            self._send()
        while self._awaited > 0 and self._watch():
            for _ in range(self._pass_time(math.inf)):
                if len(self._sent) < len(self._specs):
                    self._send()
        return self._end()

    def _send(self) -> None:
        index = len(self._sent)
        spec = self._specs[index]
        try:
            reply = self._simulation.submit(prompt_ids(spec), spec.output_tokens, images_of(spec))
        except ConfigError as error:
            raise BenchError(str(error)) from None
        sent = SentRequest(index, self._simulation.now(), reply)
        self._sent.append(sent)
        self._open[reply.handle] = sent

    def _watch(self) -> bool:
        """Do what is due at this moment besides sending; False if the load ends."""
        now_s = self._simulation.now()
        if now_s >= self._next_reading_s():
            self._readings += 1
            self._read()
        if now_s >= self._next_tick_s():
            self._ticks += 1
            if not self._tick():
                return False
        return now_s < self._limit_s

    def _pass_time(self, until_s: float) -> int:
        """Let time pass up to the next thing to do, or until requests end; returns how many did."""
        until_s = min(until_s, self._next_tick_s(), self._next_reading_s(), self._limit_s)
        ended = self._simulation.run_until(until_s)
        for reply in ended:
            sent = self._open.pop(reply.handle)
            self._awaited -= sent.index < self._needed
            if reply.error:
                self._failed += 1
            else:
                self._finished += 1
        return len(ended)

    def _next_tick_s(self) -> float:
        return self._start_s + self._ticks * TICK_S

    def _next_reading_s(self) -> float:
        return self._start_s + self._readings * SCRAPE_EVERY_S

    def _tick(self) -> bool:
        first_token = sum(sent.reply.count > 0 for sent in self._open.values()) + self._finished
        now_s = self._simulation.now() - self._start_s
        return self._observer.tick(now_s, len(self._sent), first_token, self._finished, self._failed)

    def _end(self) -> SimulatedRecording:
        """Close the connections, as the load generator does, and call the observer a last time."""
        cut_short = bool(self._open) or len(self._sent) < len(self._specs)
        self._simulation.abort([sent.reply for sent in self._open.values()])
        self._tick()
        return SimulatedRecording(self._simulation, self._sent, self._specs, self._start_s, cut_short=cut_short)
