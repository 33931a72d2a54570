"""A load that several hosts generate: divided by the seed, begun at one time, watched, merged into one recording."""

import contextlib
import ipaddress
import select
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np

from bench.errors import BenchError
from bench.generators.channel import ChannelError
from bench.generators.clocks import clock_fault, host_clock
from bench.generators.handshake import network, processes
from bench.generators.messages import Cut, Enough, Prepare
from bench.generators.remote import Generator, LostGeneratorError, Part, Waiting, offsets_of, use_of
from bench.generators.split import divide
from bench.loadgen import Observer, Recording
from bench.loadgen.job import LEAD_NS, Job, Start
from bench.loadgen.load import closed_job, expected_chunks_per_s, open_job
from bench.loadgen.recording import HostClock, HostPart, merged_use
from bench.loadgen.stream import Stream
from bench.target import Target
from bench.workloads.base import RequestSpec

_MARGIN_NS = 200_000_000  # of the begin, for its message and for what a generator does between it and the first request
_TICK_S = 0.1
_END_LIMIT_S = 30.0  # from the message that ends a load to its end
_NAMES = ("sent", "first_token", "finished", "failed")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Generators:
    """The generators of a run; connections are kept between loads, and made again where they broke.

    Args:
        addresses: host and port of each.
        token: of the run.
        tls: None: connections are not encrypted.
        seed: decides which generator sends which request.
        waiting: for generators that cannot be reached; None: for the usual time, without a word.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        token: bytes,
        tls: ssl.SSLContext | None = None,
        seed: int = 0,
        waiting: Waiting | None = None,
    ):
        self._waiting = waiting or Waiting()
        self._all = [Generator(host, port, token, tls, self._waiting) for host, port in addresses]
        self._seed = seed

    def __enter__(self) -> "Generators":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self) -> None:
        """Connect to all generators; raises LostGeneratorError that names all that fail."""
        self._waiting.ended.clear()
        failed = [error for error in _together(_connected, self._all) if error is not None]
        if failed:
            raise LostGeneratorError("; ".join(str(error) for error in failed))

    def close(self) -> None:
        self._waiting.ended.set()
        for generator in self._all:
            generator.close()

    @property
    def names(self) -> list[str]:
        return [generator.name for generator in self._all]

    def described(self) -> str:
        """The generators and their cores, in words."""
        known = [(one.name, one.welcome.cores) for one in self._all if one.welcome is not None]
        shown = (f"{name} ({cores} core{'s' if cores > 1 else ''})" for name, cores in known)
        return f"generators: {', '.join(shown)}"

    def pids_here(self) -> list[int]:
        """Processes of generators that this process sees."""
        known = [generator.welcome for generator in self._all if generator.welcome is not None]
        return [welcome.pid for welcome in known if welcome.processes == processes()]

    def check(self, target: Target) -> None:
        """Raise BenchError if a generator certainly cannot send requests to the target as it is addressed."""
        if not _is_loopback(target):
            return
        for generator in self._all:
            if generator.welcome is not None and generator.welcome.network != network():
                raise BenchError(
                    f"generator {generator.name} is on another host, which cannot reach {target.base_url}: "
                    "give an address of the server that all hosts can reach (--url)"
                )

    def run_load(
        self,
        target: Target,
        specs: list[RequestSpec],
        times: np.ndarray,
        *,
        observer: Observer,
        time_limit_s: float,
        needed: int | None = None,
    ) -> Recording:
        """As `bench.loadgen.run_load`, from all generators. Raises LostGeneratorError before the first request."""
        job = open_job(target, specs, times, time_limit_s, needed)
        return self._run(job, target, specs, observer, expected_chunks_per_s(specs, times))

    def run_closed_loop(
        self,
        target: Target,
        specs: list[RequestSpec],
        concurrency: int,
        *,
        observer: Observer,
        time_limit_s: float,
        chunks_per_s: float,
    ) -> Recording:
        """As `bench.loadgen.run_closed_loop`, from all generators, which divide requests and concurrency."""
        job = closed_job(target, specs, concurrency, time_limit_s)
        return self._run(job, target, specs, observer, chunks_per_s)

    def _run(
        self, job: Job, target: Target, specs: list[RequestSpec], observer: Observer, chunks_per_s: float
    ) -> Recording:
        parts = self._parts(job)
        with self._closed_on_error():
            self._prepare(parts, job, target, chunks_per_s)
            for generator, part in parts.items():
                with _lost_before(generator):
                    part.before = generator.compare_clocks()
            start = Start.soon(max(LEAD_NS, job.lead_ns) + _MARGIN_NS)
            for generator, part in parts.items():
                with _lost_before(generator):
                    generator.begin(part, start.real_ns)
            cut = _Watch(parts, observer, start).run()
            for generator, part in parts.items():
                with _lost(generator, part):
                    part.after = generator.compare_clocks()
            _together(_collect, list(parts.items()))
        return self._merged(parts, specs, start, cut)

    def _parts(self, job: Job) -> dict[Generator, Part]:
        """The part of each generator that has one; few requests or a low concurrency need only some of them."""
        most = len(self._all) if job.concurrency is None else min(len(self._all), job.concurrency)
        divided = divide(len(job.payloads), most, self._seed)
        return {one: Part(indices) for one, indices in zip(self._all, divided, strict=False) if indices}

    def _prepare(self, parts: dict[Generator, Part], job: Job, target: Target, chunks_per_s: float) -> None:
        self._waiting.ended.clear()
        ca = _certificates(target)
        pairs: list[tuple[Generator, Part, Prepare]] = []
        for number, (generator, part) in enumerate(parts.items()):
            concurrency = job.concurrency
            if concurrency is not None:
                concurrency = concurrency // len(parts) + (number < concurrency % len(parts))
            prepare = Prepare(
                base_url=target.base_url,
                insecure=target.insecure,
                ca=ca,
                count=len(part.indices),
                offsets_ns=offsets_of(job.offsets_ns, part.indices) if job.concurrency is None else b"",
                time_limit_s=job.time_limit_s,
                needed=sum(index < job.needed for index in part.indices),
                concurrency=concurrency,
                chunks_per_s=chunks_per_s / len(parts),
            )
            pairs.append((generator, part, prepare))

        def send(pair: tuple[Generator, Part, Prepare]) -> None:
            generator, part, prepare = pair
            generator.connect()
            try:
                generator.prepare(part, prepare, job.payloads)
            except ChannelError:  # it may have been started anew since the last load
                generator.close()
                generator.connect()
                with _lost_before(generator):
                    generator.prepare(part, prepare, job.payloads)

        _together(send, pairs)

    def _merged(self, parts: dict[Generator, Part], specs: list[RequestSpec], start: Start, cut: bool) -> Recording:
        """One recording of all parts; requests of a lost generator are missing from it."""
        streams = [Stream(index, b"", start.real_ns) for index in range(len(specs))]
        faults: list[str] = []
        hosts: list[HostPart] = []
        for generator, part in parts.items():
            for stream in part.streams or ():
                streams[stream.index] = stream
            if part.lost:
                generator.close()
                faults.append(
                    f"generator {generator.name} was lost during the load: it {part.lost}; what it recorded of its "
                    f"{len(part.indices)} requests is missing"
                )
            hosts.append(_host_part(generator, part))
        faults += [fault for host in hosts if (fault := clock_fault(host.clock))]
        ended = [part.ended for part in parts.values() if part.ended is not None]
        return Recording(
            streams, specs, start.real_ns, merged_use([use_of(one) for one in ended]),
            cut_short=cut or any(one.cut_short for one in ended), fault="; ".join(faults), parts=hosts,
        )  # fmt: skip

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Generators end what they do when their connection is closed."""
        try:
            yield
        except BaseException:
            self.close()
            raise


def _host_part(generator: Generator, part: Part) -> HostPart:
    """What a recording says of a generator."""
    assert part.before is not None
    unknown = float("nan")
    clock = HostClock(generator.name, part.before.offset_ns / 1e9, unknown, unknown)
    if part.lost or part.after is None or part.ended is None:
        return HostPart(clock, part.indices, None)
    return HostPart(host_clock(generator.name, part.before, part.after), part.indices, use_of(part.ended))


class _Watch:
    """Watches all parts of a load until each has ended or is lost; a lost one ends the load."""

    def __init__(self, parts: dict[Generator, Part], observer: Observer, start: Start):
        self._parts = parts
        self._observer = observer
        self._start = start
        self._word: Cut | Enough | None = None  # sent to the generators
        self._end = float("inf")  # when a generator that has not ended is lost

    def run(self) -> bool:
        """Returns whether the load was ended early."""
        next_tick = 0.0
        while any(part.runs for part in self._parts.values()):
            for generator, part in self._parts.items():
                if part.runs:
                    with _lost(generator, part):
                        generator.watch(part)
                        self._check_end()
            now = time.monotonic()
            if now >= next_tick:
                next_tick = now + _TICK_S
                if not self._observe():
                    self._send(Cut())
            if any(part.lost for part in self._parts.values()):
                self._send(Cut())
            if all(part.awaited <= 0 for part in self._parts.values()):
                self._send(Enough())
            self._wait()
        self._observe()
        return isinstance(self._word, Cut)

    def _wait(self) -> None:
        """Until a generator reports something, for a part of a tick at most."""
        poll = select.poll()
        for generator, part in self._parts.items():
            if part.runs:
                poll.register(generator.channel.fileno(), select.POLLIN)
        poll.poll(_TICK_S * 1000 / 2)

    def _observe(self) -> bool:
        elapsed = (time.monotonic_ns() - self._start.mono_ns) / 1e9
        if elapsed < 0:
            return True
        parts = self._parts.values()
        return self._observer.tick(elapsed, *(sum(getattr(part.counts, name) for part in parts) for name in _NAMES))

    def _send(self, word: Cut | Enough) -> None:
        """Send the message that ends the load, unless one was sent; a cut also follows an Enough."""
        if isinstance(self._word, Cut) or (self._word is not None and isinstance(word, Enough)):
            return
        self._word = word
        self._end = time.monotonic() + _END_LIMIT_S
        for generator, part in self._parts.items():
            if part.runs:
                with _lost(generator, part):
                    generator.send(word)

    def _check_end(self) -> None:
        if time.monotonic() > self._end:
            raise ChannelError(f"did not end the load within {_END_LIMIT_S:.0f} s")


@contextlib.contextmanager
def _lost(generator: Generator, part: Part) -> Iterator[None]:
    """Mark a generator as lost instead of raising ChannelError; the first cause counts."""
    try:
        yield
    except ChannelError as error:
        part.lost = part.lost or str(error)
        generator.close()


@contextlib.contextmanager
def _lost_before(generator: Generator) -> Iterator[None]:
    """Raise LostGeneratorError instead of ChannelError: no request was sent."""
    try:
        yield
    except ChannelError as error:
        raise LostGeneratorError(f"generator {generator.name} {error}") from None


def _collect(pair: tuple[Generator, Part]) -> None:
    generator, part = pair
    if not part.lost:
        with _lost(generator, part):
            part.streams = generator.collect(part)


def _connected(generator: Generator) -> LostGeneratorError | None:
    """The error of connecting, if it fails."""
    try:
        generator.connect()
    except LostGeneratorError as error:
        return error
    return None


def _together(call: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Call for all items at once, each in a thread; the first error is raised when all are done."""
    pool = ThreadPoolExecutor(max_workers=max(1, len(items)))
    try:
        futures = [pool.submit(call, item) for item in items]
        wait(futures)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C the connections are closed, which ends the calls


def _certificates(target: Target) -> str | None:
    """The certificates of --ca as text, since generators do not have the file."""
    if target.ca is None:
        return None
    path = Path(target.ca)
    if path.is_dir():
        raise BenchError(f"--ca {path} is a folder: with --generators it must be one PEM file")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} cannot be read as certificates: {error} (--ca)") from None


def _is_loopback(target: Target) -> bool:
    host = urlsplit(target.base_url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
