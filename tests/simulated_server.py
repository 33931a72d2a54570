"""Servers on simulated hardware for tests: a Llama-3.1-8B on an H100, with few slots and blocks."""

from engine.hardware.description import read_hardware
from engine.hardware.executor import SimulatedExecutor, SimulatedHost
from engine.hardware.simulation import Simulation
from engine.hardware.step_time import DecoderShape, StepTime
from engine.hardware.virtual_engine import VirtualClock, VirtualEngine
from engine.resolved_config import ResolvedConfig

H100 = read_hardware("h100")
LLAMA_8B = DecoderShape(32, 4096, 14336, 32, 8, 128, 128256)
STEP_TIME = StepTime(H100, LLAMA_8B)
HOST = SimulatedHost(H100.host.v1, 1, overlaps=True)
REQUEST_S = 0.018
SLOTS = 32


def simulation(num_blocks: int = 4000, *, caching: bool = False, **options: object) -> Simulation:
    """Options are those of `Simulation`."""
    config = ResolvedConfig(
        max_model_len=4096, max_num_seqs=SLOTS, max_num_batched_tokens=2048, block_size=16, num_blocks=num_blocks,
        enable_prefix_caching=caching,
    )  # fmt: skip

    def make_executor(clock: VirtualClock) -> SimulatedExecutor:
        return SimulatedExecutor(clock, STEP_TIME, HOST, SLOTS, LLAMA_8B.vocab_size)

    return Simulation(config, make_executor, request_s=REQUEST_S, **options)  # type: ignore[arg-type]


def run_engine(engine: VirtualEngine, clock: VirtualClock, until: float) -> None:
    """Do everything that happens up to a time, and move the clock there."""
    engine.turn()
    while (event := engine.next_event) is not None and event <= until:
        clock.move_to(event)
        engine.turn()
    clock.move_to(until)
