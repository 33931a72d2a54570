"""Latencies of a load on described hardware, for comparison with a server that was measured under the same load."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.hardware.description import Hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.simulation import Reply, Simulation
from engine.hardware.start import SYNCHRONOUS, with_short_messages
from engine.hardware.step_time import DecoderShape, StepTime
from engine.hardware.virtual_engine import VirtualClock
from engine.resolved_config import ResolvedConfig


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """A request of a load; `at` in seconds."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Latencies:
    """Typical seconds of a load: until the first token of a request, and of each later token."""

    first_token: float
    per_token: float

    @classmethod
    def of(cls, first_tokens: Sequence[float], per_token: Sequence[float]) -> "Latencies":
        """From those of each request."""
        return cls(middle_mean(first_tokens), middle_mean(per_token))


def middle_mean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest quarter: as robust as needed, and smoother than a median."""
    ordered = np.sort(np.asarray(values, float))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def simulated_latencies(
    hardware: Hardware, shape: DecoderShape, engine: str, requests: Sequence[TimedRequest]
) -> Latencies:
    """Those of a server that runs nothing else, with prefix caching switched off.

    Args:
        engine: v1 or v0.
        requests: by time.
    """
    config = resolved_config(hardware, engine, requests)
    costs = hardware.host.of(engine)
    host = SimulatedHost(costs, 1, overlaps=not config.ablations & SYNCHRONOUS)
    step_time = StepTime(hardware, shape)

    def make_executor(clock: VirtualClock) -> SimulatedExecutor:
        return SimulatedExecutor(clock, step_time, host, config.max_num_seqs, shape.vocab_size)

    simulation = Simulation(config, make_executor, request_s=costs.request_ms * 1e-3)
    random = np.random.default_rng(0)
    replies: list[Reply] = []
    left = len(requests)
    for request in requests:
        while simulation.now() < request.at:
            left -= len(simulation.run_until(request.at))
        prompt = random.integers(0, shape.vocab_size, request.prompt_tokens, dtype=np.int32)
        replies.append(simulation.submit(prompt, request.output_tokens))
    while left:
        left -= len(simulation.run_until(simulation.now() + 1.0))
    simulation.take(replies)
    times = [reply.times for reply in replies if reply.times is not None]
    return Latencies.of(
        [one.first_s - request.at for request, one in zip(requests, times, strict=True)],
        [(one.last_s - one.first_s) / len(one.gaps_s) for one in times],
    )


def resolved_config(hardware: Hardware, engine: str, requests: Sequence[TimedRequest]) -> ResolvedConfig:
    """That of an engine with the hardware's defaults, and room for all requests.

    Raises ConfigError for hardware without defaults, which is not a measured one.
    """
    defaults = hardware.defaults
    if defaults is None:
        raise ConfigError(f"{hardware.title} has no defaults: only a profiled machine can be compared with a server")
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    config = ResolvedConfig(
        max_model_len=longest,
        max_num_seqs=defaults.max_num_seqs,
        max_num_batched_tokens=max(defaults.max_num_batched_tokens, defaults.max_num_seqs + defaults.min_chunk),
        block_size=defaults.block_size,
        num_blocks=len(requests) * (longest // defaults.block_size + 1) + 1,
        enable_prefix_caching=False,
        ablations=EngineConfig(model="measured", engine=engine).ablations,
    )
    return with_short_messages(config)
