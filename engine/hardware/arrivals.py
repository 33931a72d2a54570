"""When requests that arrive while others decode get their first token, on described hardware."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from engine.config import EngineConfig, ResolvedConfig
from engine.hardware.description import Hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.simulation import Reply, Simulation
from engine.hardware.start import SYNCHRONOUS
from engine.hardware.step_time import DecoderShape, StepTime
from engine.hardware.virtual_engine import VirtualClock


@dataclass(frozen=True, slots=True)
class ArrivingRequest:
    """`at` in seconds."""

    at: float
    prompt_tokens: int
    output_tokens: int


def median_first_token(
    hardware: Hardware, shape: DecoderShape, engine: str, requests: Sequence[ArrivingRequest]
) -> float:
    """The median time to the first token of the requests of one token, without what precedes the engine.

    Args:
        engine: v1 or v0.
        requests: by time.
    """
    config = resolved_config(hardware, engine, requests)
    costs = hardware.host.of(engine)
    host = SimulatedHost(costs, 1, overlaps=not config.ablations & SYNCHRONOUS)

    def make_executor(clock: VirtualClock) -> SimulatedExecutor:
        return SimulatedExecutor(clock, StepTime(hardware, shape), host, config.max_num_seqs, shape.vocab_size)

    simulation = Simulation(config, make_executor)
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
    return median(
        reply.times.first_s - request.at
        for request, reply in zip(requests, replies, strict=True)
        if reply.times is not None and request.output_tokens == 1
    )


def resolved_config(hardware: Hardware, engine: str, requests: Sequence[ArrivingRequest]) -> ResolvedConfig:
    """That of an engine with the hardware's defaults, and room for all requests.

    Raises ValueError for hardware that `redline profile` didn't measure.
    """
    defaults = hardware.defaults
    if defaults is None:
        raise ValueError(f"{hardware.title}: only a description that was measured can be compared with measurements")
    longest = max(request.prompt_tokens + request.output_tokens for request in requests)
    return ResolvedConfig(
        max_model_len=longest,
        max_num_seqs=defaults.max_num_seqs,
        max_num_batched_tokens=max(defaults.max_num_batched_tokens, defaults.max_num_seqs + defaults.min_chunk),
        block_size=defaults.block_size,
        num_blocks=len(requests) * (longest // defaults.block_size + 1) + 1,
        enable_prefix_caching=False,
        ablations=EngineConfig(model="measured", engine=engine).ablations,
    )
