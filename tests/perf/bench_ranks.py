"""`make bench-ranks`: what it takes to tell all ranks of a step, V1 against V0's driver that broadcasts all inputs.

Real ranks in processes of their own run a tiny model; the real scheduler plans steps in which every row decodes.
Measured are, for a step,

    bytes   what each rank but the first is sent: V1's orders, heads included, or V0's description and tensors; over
            TCP with what ZeroMQ and its encryption add
    µs      from the moment a step is planned to the moment the last rank has its inputs and begins to compute: V1's
            orders to all ranks, each of which builds its inputs, or V0's order to rank 0, which builds and broadcasts

`v1-tcp` is V1 with ranks that are reached over TCP, as those of other machines are; here all are on the loopback
interface. `v0-joined` is V0 with a step's tensors laid end to end in one broadcast, as nobody had it: it shows what of
V0's time is the number of tensors. Steps run one at a time, so that nothing hides behind the step before. All take
turns, --steps each, --rounds times; medians over all steps are reported, with the lowest and highest median of a turn.
Prints a table, writes results/bench-ranks.json and the figure.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench.results.environment import hardware
from engine import children
from engine.clock import MonotonicClock
from engine.columns import column
from engine.config import EngineConfig
from engine.core.request import Request
from engine.core.scheduler import Scheduler
from engine.core.steps import ScheduledStep
from engine.memory import resolve
from engine.messages import AddRequest, Sampling, decode_result, encode, make_handle
from engine.model.model_info import read_model_info
from engine.worker.local_links import LocalLinks
from engine.worker.multiprocess import MultiprocessExecutor
from engine.worker.rank_protocol import sample_body
from engine.worker.tcp_links import TcpLinks
from tests.engine.worker.loopback_hosts import LoopbackHosts
from tests.perf.bar_charts import save_figure
from tests.perf.ranks_figure import ranks_figure
from tests.perf.ranks_rank import FOLDER

DRIVEN = ("driver-broadcast",)
WAYS: dict[str, tuple[str, ...]] = {"v1": (), "v1-tcp": (), "v0": DRIVEN, "v0-joined": DRIVEN}
HEADER = 5  # bytes on a rank's socket, see engine.worker.local_links
# Of a message in ZeroMQ's CURVE, and of the head of its frame, which is longer from 256 bytes on (ZMTP 3.1, RFC 26).
ENCRYPTED, FRAME, LONG_FRAME = 33, 2, 9
CONTEXT = 512  # tokens of a row, about
BLOCK_SIZE = 16
BUDGET = 2048
PATIENCE_S = 120.0
MODEL = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip
MODEL_IN_WORDS = "2 layers, 64 wide, random weights"


@dataclasses.dataclass(slots=True)
class Told:
    """Of the measured steps of one way: when each was planned, and what V1's orders took."""

    planned_ns: dict[int, int] = dataclasses.field(default_factory=dict)
    order_bytes: dict[int, int] = dataclasses.field(default_factory=dict)


class Engine:
    """A scheduler and its ranks; steps one at a time."""

    def __init__(self, folder: Path, model: Path, ranks: int, rows: int, way: str):
        self.folder, self.tcp = folder, way == "v1-tcp"
        length = CONTEXT + 256
        config = EngineConfig(
            model=str(model), tensor_parallel_size=ranks, max_num_seqs=rows, max_num_batched_tokens=BUDGET,
            block_size=BLOCK_SIZE, max_model_len=length, dtype="float32", load_format="dummy", ablate=WAYS[way],
        )  # fmt: skip
        model_info = read_model_info(config)
        blocks = rows * length // BLOCK_SIZE + 1
        config = dataclasses.replace(config, kv_cache_memory_bytes=blocks * BLOCK_SIZE * model_info.kv_bytes_per_token)
        self.config = resolve(config, model_info).config
        links = TcpLinks(LoopbackHosts()) if self.tcp else LocalLinks(str(folder))
        self.executor = MultiprocessExecutor(config, model_info, self.config, links=links)
        self.scheduler = Scheduler(self.config)
        self._clock = MonotonicClock()
        self._handles = iter(range(1 << 30))

    def fill(self, rows: int) -> None:
        """Have so many rows decode; their contexts end at all places of a block."""
        for handle in list(self.scheduler.requests):
            self.scheduler.abort(handle)
        for number in range(rows):
            prompt = np.random.default_rng(number).integers(3, MODEL["vocab_size"], CONTEXT + number % BLOCK_SIZE)
            handle = make_handle(0, next(self._handles))
            message = AddRequest(handle, column(prompt), self.config.max_model_len, Sampling())
            self.scheduler.add(Request(message, self.config.max_model_len, self._clock.now()))
        while self.step()[0].num_tokens != rows or len(self.scheduler.waiting):
            pass

    def step(self) -> tuple[ScheduledStep, int, int]:
        """Plan a step and run it; with when it was planned, and the bytes of its orders as each rank gets them."""
        plan = self.scheduler.schedule(self._clock.now())
        assert plan is not None
        planned = time.monotonic_ns()
        message = encode(plan.message)
        self.executor.submit(message)
        result = self.executor.sample(plan.step).result(PATIENCE_S)
        self.scheduler.update(plan, decode_result(result))
        sizes = len(message), len(sample_body(plan.step))
        return plan, planned, sum(map(bytes_over_tcp, sizes)) if self.tcp else sum(HEADER + size for size in sizes)

    def measure(self, steps: int, told: Told) -> list[int]:
        """Run so many steps; their numbers."""
        numbers = []
        for _ in range(steps):
            plan, planned, sent = self.step()
            told.planned_ns[plan.step], told.order_bytes[plan.step] = planned, sent
            numbers.append(plan.step)
        return numbers

    def end(self) -> None:
        self.executor.shutdown()

    def rank_logs(self, ranks: int) -> list[dict[int, tuple[int, int]]]:
        """Of each rank that has ended: for a step, when it had its inputs and what was broadcast for them."""
        logs = []
        for rank in range(ranks):
            log = np.fromfile(self.folder / f"rank-{rank}.bin", dtype=np.int64).reshape(-1, 3).tolist()
            logs.append({step: (at, sent) for step, at, sent in log})
        return logs


def bytes_over_tcp(body: int) -> int:
    """The bytes of a command with a body of so many, as they leave the executor's machine."""
    message = 1 + body + ENCRYPTED
    return message + (FRAME if message < 256 else LONG_FRAME)


@contextmanager
def noting_ranks(folder: Path) -> Iterator[None]:
    """Executors start ranks that note what they see in a folder (see ranks_rank.py)."""
    spawn = children.spawn

    def start(_module: str, options: Any, inherit: Any = (), environment: Any = None) -> Any:
        return spawn("tests.perf.ranks_rank", options, inherit, {**(environment or {}), FOLDER: str(folder)})

    children.spawn = start
    try:
        yield
    finally:
        children.spawn = spawn


def run_all(ranks: int, sizes: list[int], rounds: int, steps: int) -> list[dict[str, Any]]:
    """All rows of one number of ranks: both ways are up, and take turns."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as ends:
        model = Path(name)
        (model / "config.json").write_text(json.dumps(MODEL))
        engines, told = {}, {way: Told() for way in WAYS}
        for way in WAYS:
            (folder := model / way).mkdir()
            with noting_ranks(folder):
                engines[way] = Engine(folder, model, ranks, max(sizes), way)
            ends.callback(engines[way].end)
        measured: dict[tuple[int, str], list[list[int]]] = {}
        for size in sizes:
            for engine in engines.values():
                engine.fill(size)
            for number in range(rounds + 1):
                for way, engine in engines.items():
                    found = engine.measure(steps, told[way])
                    if number:  # the first turn warms up
                        measured.setdefault((size, way), []).append(found)
        ends.close()
        logs = {way: engine.rank_logs(ranks) for way, engine in engines.items()}
    return [row_of(ranks, size, way, turns, told[way], logs[way]) for (size, way), turns in measured.items()]


def row_of(
    ranks: int, size: int, way: str, turns: list[list[int]], told: Told, logs: list[dict[int, tuple[int, int]]]
) -> dict[str, Any]:
    times = [[(max(log[step][0] for log in logs) - told.planned_ns[step]) / 1e3 for step in turn] for turn in turns]
    steps = [step for turn in turns for step in turn]
    sent = [logs[1][step][1] if WAYS[way] else told.order_bytes[step] for step in steps]
    middles = [median(turn) for turn in times]
    every = [one for turn in times for one in turn]
    return {
        "engine": way,
        "ranks": ranks,
        "rows": size,
        "bytes": median(sent),
        "bytes_most": max(sent),
        "us": round(median(every), 1),
        "us_low": round(min(middles), 1),
        "us_high": round(max(middles), 1),
        "us_p90": round(float(np.percentile(every, 90)), 1),
        "steps": len(every),
        "context": CONTEXT,
        "block_size": BLOCK_SIZE,
        "model": MODEL_IN_WORDS,
        "hardware": f"{hardware()['cpu']}, {len(os.sched_getaffinity(0))} cores for all ranks",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="that decode")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each way")
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--figure", type=Path, default=Path("docs/figures/bench-ranks.png"))
    given = parser.parse_args()
    most = (given.rounds + 1) * given.steps
    if most > 240:
        sys.exit(f"--rounds {given.rounds} turns of --steps {given.steps} are more than a row's 240 tokens of room")
    rows: list[dict[str, Any]] = []
    print("a step, told to all ranks    bytes a rank         µs   (medians of turns)", flush=True)
    for ranks in given.ranks:
        for row in run_all(ranks, given.rows, given.rounds, given.steps):
            rows.append(row)
            what = f"{ranks} ranks, {row['rows']:>3} rows, {row['engine']}"
            span = f"({row['us_low']:,.0f} to {row['us_high']:,.0f})"
            print(f"{what:<28} {row['bytes']:>12,.0f} {row['us']:>10,.0f}   {span}", flush=True)
    path = Path("results") / "bench-ranks.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")
    save_figure(ranks_figure, path, given.figure)
    print(f"rows in {path}, figure in {given.figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
