"""Loads of published measurements on simulated hardware, and what clients measure of them."""

import math
from collections.abc import Iterator
from statistics import fmean

import numpy as np

from engine.config import EngineConfig
from engine.devices.simulated import defaults_of
from engine.errors import ConfigError
from engine.hardware.description import Hardware, read_hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.gemm import ITEM_BYTES
from engine.hardware.simulation import Reply, Simulation
from engine.hardware.step_time import DecoderShape, StepTime, layer_weights
from engine.resolved_config import ResolvedConfig
from engine.simulation import without_core_log
from tests.perf.sim_engines import OtherEngine, read_engine
from tests.perf.sim_rows import Case

BLOCK = 16
IN_FRONT = {"inline-frontend", "inline-processing"}  # parts of V0 whose time is among its host costs
UTILIZATION, RESERVED = 0.9, 4e9  # of the memory; bytes of each rank for the runtime, graphs and activations
WAVES, SIMULATED_WAVES = 10, 3  # requests of a closed loop by their concurrency: measured as a rule, and simulated
WITH_FIRST_TOKEN = ("ttft_mean", "e2e_latency_mean", "e2e_mean")  # latencies that a wait for the first token adds to
RATE_SECONDS, RATE_WARMUP = 120.0, 20.0


def simulate(case: Case) -> dict[str, float]:
    """What a client would measure, in milliseconds and per second. Raises ConfigError for what has no times."""
    hardware, other = _hardware(case)
    costs = other.host if other else hardware.host.of(case.engine)
    config = resolved(case, hardware, other)
    host = SimulatedHost(costs, case.ranks, overlaps=case.engine != "v0")
    step_time = StepTime(hardware, case.shape, case.ranks)
    simulation = Simulation(
        config,
        lambda clock: SimulatedExecutor(clock, step_time, host, config.max_num_seqs, case.shape.vocab_size),
        request_s=costs.request_ms * 1e-3,
    )
    drive = {"closed": closed_loop, "at once": at_once, "rate": at_rate}[case.load]
    with without_core_log():
        return drive(simulation, case)


def _hardware(case: Case) -> tuple[Hardware, OtherEngine | None]:
    hardware = read_hardware(case.hardware)
    if case.engine in ("v1", "v0"):
        return hardware, None
    other = read_engine(case.engine)
    return other.on(hardware), other


def weight_bytes(shape: DecoderShape) -> float:
    """Of all ranks together; embeddings and head in bf16."""
    layers = shape.num_layers * layer_weights(shape)
    return layers * ITEM_BYTES[shape.gemm_dtype] + 4 * shape.vocab_size * shape.hidden_size


def resolved(case: Case, hardware: Hardware, other: OtherEngine | None) -> ResolvedConfig:
    """The server's configuration: its own defaults, where the source of the row names no flags."""
    shape = case.shape
    kv_heads = max(shape.num_kv_heads, case.ranks) / shape.num_kv_heads  # ranks beyond them hold copies
    memory = case.ranks * (UTILIZATION * hardware.memory_bytes - RESERVED) - weight_bytes(shape)
    tokens = int(memory / (shape.kv_bytes * kv_heads * shape.num_layers))
    longest = case.input + case.output if case.spread else 4096
    if tokens < longest:
        raise ConfigError(f"the memory has room for {max(tokens, 0):,} tokens, a request has {longest:,}")
    defaults = defaults_of(hardware, case.engine)
    rows = defaults.max_num_seqs
    if case.load == "closed":
        rows = min(rows, int(case.value))
    if other is not None and other.whole_requests:
        rows = max(min(rows, tokens // longest), 1)
    ablate = other.ablations if other else ()
    engine = EngineConfig(model="simulated", engine="v0" if case.engine == "v0" else "v1", ablate=ablate)
    return ResolvedConfig(
        max_model_len=longest,
        max_num_seqs=rows,
        max_num_batched_tokens=max(defaults.max_num_batched_tokens, longest if case.engine == "v0" else 0),
        block_size=BLOCK,
        num_blocks=tokens // BLOCK + 2,
        enable_prefix_caching=False,
        ablations=engine.ablations - IN_FRONT,
    )


def lengths(case: Case) -> Iterator[tuple[int, int]]:
    """Input and output tokens of each request."""
    rng = np.random.default_rng(1)
    while True:
        if case.spread:
            one = [int(rng.integers(int(case.spread * most), most + 1)) for most in (case.input, case.output)]
        else:
            one = [int(np.clip(rng.exponential(mean), 4, 2000)) for mean in (case.input, case.output)]
        yield one[0], max(one[1], 1)


class Client:
    """Sends the requests of a case, and remembers when."""

    def __init__(self, simulation: Simulation, case: Case):
        self.simulation = simulation
        self.sent: dict[int, float] = {}
        self._replies: dict[int, Reply] = {}
        self._lengths, self._rng = lengths(case), np.random.default_rng(2)

    def send(self, *, shortened: bool = False) -> int:
        """Send the next request; one that is `shortened` makes any part of its output."""
        prompt, output = next(self._lengths)
        if shortened:
            output = int(self._rng.integers(1, output + 1))
        tokens = self._rng.integers(0, 1000, prompt, dtype=np.int32)
        reply = self.simulation.submit(tokens, output)
        self._replies[reply.handle], self.sent[reply.handle] = reply, self.simulation.now()
        return reply.handle

    def wait(self, until: float = math.inf) -> list[Reply]:
        """Requests that ended, none if nothing ends until then. Raises RuntimeError for one that isn't served."""
        ended = self.simulation.run_until(until)
        for one in ended:
            if one.error:
                raise RuntimeError(f"a simulated request failed: {one.error}")
        return ended

    def latencies(self, handles: list[int]) -> dict[str, float]:
        """Means over some requests, in milliseconds."""
        replies = [self._replies.pop(handle) for handle in handles]
        self.simulation.take(replies)
        first, between, gaps, whole = [], [], [], []
        for one in replies:
            assert one.times is not None
            first.append(one.times.first_s - self.sent[one.handle])
            whole.append(one.times.last_s - self.sent[one.handle])
            if one.count > 1:
                between.append((one.times.last_s - one.times.first_s) / (one.count - 1))
            gaps.append((one.times.last_s - one.times.first_s, one.count - 1))
        found = {"ttft_mean": fmean(first), "e2e_latency_mean": fmean(whole), "e2e_mean": fmean(whole)}
        if between:
            found["tpot_mean"] = fmean(between)
            found["itl_mean"] = sum(span for span, _ in gaps) / sum(count for _, count in gaps)
        return {name: 1e3 * seconds for name, seconds in found.items()}


def closed_loop(simulation: Simulation, case: Case) -> dict[str, float]:
    """A number of requests at any time; all clients begin at once, and each sends its next request at once.

    The first wave waits for all prompts; the others are alike. So a few waves are simulated, and weighted as in a
    measurement of WAVES.

    Requests of equal length stay together: those whose prompts shared a step end in one step, and so do their
    successors. In a measurement the small delays of clients part them within some waves, unless the scheduler brings
    them together again, as it does if it computes all prompts before it decodes. Here the first wave's outputs have
    any length up to the case's, and only the times to its first tokens count.
    """
    client, width = Client(simulation, case), int(case.value)
    parted = case.spread == 1.0 and "prefill-first" not in simulation.config.ablations
    order = [client.send(shortened=parted) for _ in range(width)]
    wanted = set(range((SIMULATED_WAVES - 1) * width))
    tokens, begin = 0, 0.0
    while wanted:
        for one in client.wait():
            wanted.discard(one.handle)
            order.append(client.send())
            if one.handle >= width:
                tokens += one.count
            else:
                tokens, begin = 0, simulation.now()
    first, found = client.latencies(order[:width]), client.latencies(order[width : (SIMULATED_WAVES - 1) * width])
    waited = (first["ttft_mean"] - found["ttft_mean"]) / WAVES
    for name in found:
        if not parted:
            found[name] += (first[name] - found[name]) / WAVES
        elif name in WITH_FIRST_TOKEN:
            found[name] += waited
    return found | {"output_tput": tokens / (simulation.now() - begin)}


def at_once(simulation: Simulation, case: Case) -> dict[str, float]:
    """All requests at the start."""
    client, count = Client(simulation, case), int(case.value)
    handles = [client.send() for _ in range(count)]
    left, tokens = count, 0
    while left:
        ended = client.wait()
        left -= len(ended)
        tokens += sum(one.count for one in ended)
    seconds = simulation.now()
    rates = {"duration": 1e3 * seconds, "req_tput": count / seconds, "output_tput": tokens / seconds}
    return client.latencies(handles) | rates | {"output_tput_per_gpu": tokens / seconds / case.ranks}


def at_rate(simulation: Simulation, case: Case) -> dict[str, float]:
    """Poisson arrivals."""
    client, rng = Client(simulation, case), np.random.default_rng(3)
    arrival, measured, open_requests = 0.0, [], set[int]()
    while arrival < RATE_SECONDS or not open_requests.isdisjoint(measured):
        for one in client.wait(arrival):
            open_requests.discard(one.handle)
        if simulation.now() < arrival:
            continue
        handle = client.send()
        open_requests.add(handle)
        if RATE_WARMUP <= arrival < RATE_SECONDS:
            measured.append(handle)
        arrival += float(rng.exponential(1 / case.value))
    return client.latencies(measured)
