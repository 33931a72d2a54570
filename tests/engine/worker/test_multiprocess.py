"""Several ranks in processes of their own: the tokens of one rank, and an end that names its cause."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from engine.children import ChildProcess
from engine.columns import column, int32s
from engine.config import EngineConfig
from engine.errors import EngineDeadError, ModelError
from engine.memory import resolve
from engine.messages import Sampling, SlotAssignment, StepMessage, decode_result, encode
from engine.model.model_info import read_model_info
from engine.worker.in_process import InProcessExecutor
from engine.worker.multiprocess import MultiprocessExecutor
from engine.worker.rank_links import RankLinks
from engine.worker.tcp_links import TcpLinks
from tests.engine.worker.driver import BASE, MODELS, Driver, Request, build_model
from tests.engine.worker.loopback_hosts import LoopbackHosts

BLOCK, BLOCKS, ROWS = 4, 1200, 5
DRIVEN = ("driver-broadcast",)
PATIENCE_S = 60.0


def start(
    folder: Path, size: int, block_size: int = BLOCK, *, links: RankLinks | None = None, **options: Any
) -> Driver:
    options = {"dtype": "float32", "max_num_seqs": ROWS, **options}
    config = EngineConfig(model=str(folder), tensor_parallel_size=size, block_size=block_size, **options)
    model_info = read_model_info(config)
    config = dataclasses.replace(config, kv_cache_memory_bytes=model_info.kv_bytes_per_token * block_size * BLOCKS)
    resolved = resolve(config, model_info).config
    assert resolved.num_blocks == BLOCKS
    executor: Any = (
        InProcessExecutor(config, model_info, resolved)
        if config.num_ranks == 1
        else MultiprocessExecutor(config, model_info, resolved, links=links)
    )
    return Driver(
        executor,
        rows=config.max_num_seqs,
        block_size=block_size,
        num_blocks=BLOCKS,
        windows=resolved.kv_windows,
    )


def make_requests() -> list[Request]:
    """Shared beginnings, one token and many, greedy and drawn, penalties and all."""
    shared = [(7 * i) % 120 + 1 for i in range(21)]
    prompts = [[3], [5, 6, 7], [i % 90 + 2 for i in range(70)], [*shared, 8], [*shared, 9, 10], [*shared[:16], 1]]
    drawn = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "presence_penalty": 0.5}
    greedy = [Request(prompt) for prompt in prompts]
    return greedy + [Request(prompt, Sampling(seed=100 + i, **drawn)) for i, prompt in enumerate(prompts)]


def outputs(driver: Driver, schedule: int) -> list[list[int]]:
    requests = make_requests()
    driver.run(requests, 12, seed=schedule, chunk=5, preempt=0.4)
    return [request.output for request in requests]


def pids_of(executor: MultiprocessExecutor) -> list[int]:
    return [rank.pid for rank in executor.ranks]


def exit_codes(executor: MultiprocessExecutor) -> list[int | None]:
    codes = []
    for rank in executor.ranks:
        assert isinstance(rank, ChildProcess)
        codes.append(rank.returncode)
    return codes


def gone(pid: int) -> bool:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("kind", "size", "stages", "ablate", "tcp"),
    [
        ("llama", 2, 1, (), False),
        ("qwen2", 2, 1, (), True),
        ("qwen3", 4, 1, (), False),
        ("llama", 4, 1, DRIVEN, True),
        ("qwen2", 2, 1, DRIVEN, False),
        ("qwen3", 2, 2, (), True),
    ],
)
def test_ranks_give_the_tokens_of_one(
    kind: str,
    size: int,
    stages: int,
    ablate: tuple[str, ...],
    tcp: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if size == 4:
        monkeypatch.setitem(MODELS, kind, {**MODELS[kind], "num_key_value_heads": 4})
    build_model(kind, tmp_path)
    alone = start(tmp_path, 1)
    try:
        expected = outputs(alone, 1)
    finally:
        alone.executor.shutdown()
    assert len({token for tokens in expected for token in tokens}) > 20
    ranks = start(tmp_path, size, ablate=ablate, links=over_tcp() if tcp else None, pipeline_parallel_size=stages)
    executor = ranks.executor
    assert isinstance(executor, MultiprocessExecutor)
    pids = pids_of(executor)
    try:
        assert outputs(ranks, 2) == expected
        assert ranks.preemptions > 0
        assert ranks.shared > 0
        assert set(executor.seconds) == {
            "start ranks", "import torch", "open model", "join ranks", "load weights", "prepare kernels"
        }  # fmt: skip
    finally:
        executor.shutdown()
    assert len(pids) == size * stages
    assert all(gone(pid) for pid in pids)
    assert exit_codes(executor) == [0] * size * stages, "none had to be ended by force"
    assert not executor.ended.done()
    with pytest.raises(EngineDeadError, match="shut down"):
        executor.sample(0).result(PATIENCE_S)


@pytest.fixture
def dummy(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({**BASE, "model_type": "llama"}))
    return tmp_path


def over_tcp() -> TcpLinks:
    return TcpLinks(LoopbackHosts())


@pytest.fixture(params=[((), None), (DRIVEN, None), ((), over_tcp)], ids=["all receive", "rank 0 drives", "over TCP"])
def ranks(dummy: Path, request: pytest.FixtureRequest) -> Iterator[MultiprocessExecutor]:
    ablate, make_links = request.param
    links = None if make_links is None else make_links()
    executor: Any = start(dummy, 2, load_format="dummy", ablate=ablate, links=links).executor
    yield executor
    executor.shutdown()


FIRST = SlotAssignment(0, 1, column([1, 2, 3]), 3, 0, (column(range(1, 30)),), Sampling())


def submit(executor: Any, message: StepMessage) -> tuple["Future[None]", "Future[bytes]"]:
    return executor.submit(encode(message)), executor.sample(message.step)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_steps_run_ahead_idle_ranks_use_no_processor_and_are_missed_when_gone(ranks: MultiprocessExecutor) -> None:
    messages = [
        StepMessage(0, assigned_slots=(FIRST,), chunks=column([[0, 3]])),
        *(StepMessage(i) for i in range(1, 40)),
    ]
    results = [submit(ranks, message)[1] for message in messages]
    tokens = [int32s(decode_result(result.result(PATIENCE_S)).tokens) for result in results]
    assert [len(one) for one in tokens] == [1] * 40
    time.sleep(0.3)
    before = sum(map(cpu_seconds, pids_of(ranks)))
    time.sleep(1.0)
    assert sum(map(cpu_seconds, pids_of(ranks))) - before <= 0.05
    os.kill(pids_of(ranks)[1], signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"^rank 1 .* was killed by SIGKILL"):
        ranks.ended.result(PATIENCE_S)
    assert all(gone(pid) for pid in pids_of(ranks))


def test_a_killed_rank_fails_what_is_pending_and_is_named(ranks: MultiprocessExecutor) -> None:
    pid, other = pids_of(ranks)
    steps = [StepMessage(0, assigned_slots=(FIRST,), chunks=column([[0, 3]])), *(StepMessage(i) for i in range(1, 80))]
    results = [submit(ranks, message)[1] for message in steps]
    results[0].result(PATIENCE_S)
    os.kill(pid, signal.SIGKILL)
    cause = rf"^rank 0 \(process {pid}\) was killed by SIGKILL"
    with pytest.raises(EngineDeadError, match=cause):
        results[-1].result(PATIENCE_S)
    with pytest.raises(EngineDeadError, match=cause):
        ranks.ended.result(PATIENCE_S)
    for later in submit(ranks, StepMessage(80)):
        with pytest.raises(EngineDeadError, match=cause):
            later.result(PATIENCE_S)
    assert gone(pid)
    assert gone(other)


def test_a_step_that_was_not_sampled_keeps_no_rank_from_its_end(ranks: MultiprocessExecutor) -> None:
    ranks.submit(encode(StepMessage(0, assigned_slots=(FIRST,), chunks=column([[0, 3]])))).result(PATIENCE_S)
    ranks.shutdown()
    assert -signal.SIGKILL not in exit_codes(ranks)


def test_an_error_in_the_ranks_is_shown_with_its_rank(ranks: MultiprocessExecutor) -> None:
    _, result = submit(ranks, StepMessage(0, new_blocks=column([[0, 7, 1]])))
    with pytest.raises(EngineDeadError, match=r"^rank [01] \(process \d+\): RuntimeError: .*KV group 7 of slot 0"):
        result.result(PATIENCE_S)


def test_a_thread_that_fails_fails_what_is_pending_and_ends_the_ranks(
    dummy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor: Any = start(dummy, 2, load_format="dummy").executor
    try:
        pids = pids_of(executor)

        def broken(_: bytes) -> bool:
            raise OSError("no memory to share")

        monkeypatch.setattr(executor._links._ring, "write", broken)
        for future in submit(executor, StepMessage(0)):
            with pytest.raises(EngineDeadError, match="the ranks can't be reached any more: OSError: no memory to sh"):
                future.result(PATIENCE_S)
        assert isinstance(executor.ended.exception(PATIENCE_S), EngineDeadError)
        assert all(gone(pid) for pid in pids)
    finally:
        executor.shutdown()


def test_a_rank_that_can_not_start_says_why(tmp_path: Path) -> None:
    build_model("llama", tmp_path)
    weights = tmp_path / "model.safetensors"
    config = EngineConfig(model=str(tmp_path), tensor_parallel_size=2)
    model_info = read_model_info(config)
    resolved = resolve(config, model_info).config
    weights.unlink()
    with pytest.raises(ModelError, match=r"^rank [01] \(process \d+\): .*has a config.json but no weights"):
        MultiprocessExecutor(config, model_info, resolved)


def test_ranks_end_with_their_parent(dummy: Path) -> None:
    """The parent is killed, so that nothing of it can tidy up."""
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.engine.worker.test_multiprocess import start\n"
        "driver = start(Path(sys.argv[1]), 2, load_format='dummy')\n"
        "print(*(rank.pid for rank in driver.executor.ranks), flush=True)\n"
        "time.sleep(600)\n"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", script, str(dummy)], cwd=root, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)
