"""--kv-spill with real models, memory and files: the tokens of a KV cache that holds everything."""

import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.block_files import PREFIX
from engine.clock import MonotonicClock
from engine.columns import column, int32s, int64s
from engine.config import EngineConfig
from engine.core.engine import EngineCore
from engine.core.spill_start import SpillStore
from engine.errors import ConfigError
from engine.executor_backend import RAY
from engine.kv_format import KVLayout
from engine.memory import resolve
from engine.messages import AddRequest, FinishReason, Outputs, Sampling, decode_from_core, encode
from engine.model.model_info import ModelInfo, read_model_info
from engine.resolved_config import ResolvedConfig
from engine.stats import SpillStats, Stats
from engine.worker.in_process import InProcessExecutor
from engine.worker.multiprocess import MultiprocessExecutor
from engine.worker.tcp_links import TcpLinks
from redline import LLM, SamplingParams
from tests.engine.worker.driver import build_model
from tests.engine.worker.loopback_hosts import LoopbackHosts
from tests.tiny import write_tiny

PATIENCE_S = 90.0
BLOCK, BLOCKS, NEW = 16, 18, 12
OVER_TCP = {"distributed_executor_backend": RAY}
# Each takes 7 blocks; the pool holds two.
PROMPTS = [[(7 * i + 13 * number) % 120 + 1 for i in range(90 + number)] for number in range(8)]


def start_ranks(config: EngineConfig, model_info: ModelInfo, resolved: ResolvedConfig) -> Any:
    """The executor of a configuration, with all ranks on this machine; over TCP for the backend of several machines."""
    if config.num_ranks == 1:
        return InProcessExecutor(config, model_info, resolved)
    several = config.distributed_executor_backend == RAY
    return MultiprocessExecutor(config, model_info, resolved, links=TcpLinks(LoopbackHosts()) if several else None)


class Served:
    """A core over real ranks, with as many KV blocks as a request needs and some, unless `blocks` says otherwise.

    `start` makes the executor, with the arguments of `start_ranks`.
    """

    def __init__(
        self,
        folder: Path,
        size: int = 1,
        blocks: int = BLOCKS,
        kv_spill: str | None = None,
        start: Callable[..., Any] = start_ranks,
        **flags: Any,
    ):
        config = EngineConfig(
            model=str(folder), tensor_parallel_size=size, max_num_seqs=2, block_size=BLOCK, kv_spill=kv_spill,
            max_model_len=128, **{"max_num_batched_tokens": 24, "dtype": "float32"} | flags,
        )  # fmt: skip
        info = read_model_info(config)
        config = dataclasses.replace(config, kv_cache_memory_bytes=info.kv_bytes_per_token * BLOCK * blocks)
        resolved = resolve(config, info).config
        self.executor = start(config, info, resolved)
        self.core = EngineCore(resolved, self.executor, MonotonicClock(), self._receive)
        self.store = None
        if kv_spill is not None:
            layout = KVLayout.of(config, resolved, str(info.path), info.dtype, self.executor.kernels)
            self.store = SpillStore(config, resolved, layout, self.executor, self.core.scheduler, lambda: None)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.stats = Stats()
        self._reasons: dict[int, FinishReason] = {}
        self._handle = 0

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.shutdown()
        if self.store is not None:
            self.store.close()

    @property
    def spill(self) -> SpillStats:
        assert self.stats.spill is not None
        return self.stats.spill

    def run(self, prompts: list[list[int]]) -> list[list[int]]:
        """The tokens of some prompts, which come at once."""
        first = self._handle
        for prompt in prompts:
            self.core.receive(encode(AddRequest(self._handle, column(prompt), NEW, Sampling())))
            self._handle += 1
        deadline = time.monotonic() + PATIENCE_S
        while self.core.has_work:
            assert time.monotonic() < deadline, f"{len(self._reasons) - first} of {len(prompts)} are done"
            if not self.core.step(time.monotonic()):
                time.sleep(0.0002)
            self.core.scheduler.check()
        assert {self._reasons[handle] for handle in range(first, self._handle)} == {FinishReason.LENGTH}
        return [self.tokens[handle] for handle in range(first, self._handle)]

    def run_in_turn(self, prompts: list[list[int]]) -> list[list[int]]:
        """The tokens of some prompts, one after the other; all that they evict is written before the next one."""
        tokens = []
        disk = self.core.scheduler.tiers.disk  # type: ignore[attr-defined]
        for prompt in prompts:
            tokens += self.run([prompt])
            deadline = time.monotonic() + PATIENCE_S
            while not disk.is_idle:
                assert time.monotonic() < deadline, f"{disk.num_written} files were written"
                self.core.step(time.monotonic())
                time.sleep(0.001)
        return tokens

    def _receive(self, _: int, data: bytes) -> None:
        message = decode_from_core(data)
        assert isinstance(message, Outputs)
        for handle, token in zip(int64s(message.handles).tolist(), int32s(message.tokens).tolist(), strict=True):
            self.tokens[handle].append(token)
        self._reasons |= {one.handle: FinishReason(one.reason) for one in message.finished}
        self.stats = message.stats or self.stats


def sizes(folder: Path, blocks: int) -> int:
    """Bytes of so many blocks in float32."""
    config = EngineConfig(model=str(folder), dtype="float32", load_format="dummy")
    return read_model_info(config).kv_bytes_per_token * BLOCK * blocks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_model("llama", folder, head_dim=16, num_key_value_heads=4, intermediate_size=64)
    return folder


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with Served(model, blocks=200) as served:
        tokens = served.run(PROMPTS)
    assert len({token for output in tokens for token in output}) > 20, "a model that repeats itself proves nothing"
    return tokens


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, {}),
        (1, {"kernels": "torch"}),
        (2, {}),
        (2, OVER_TCP),
        (1, {"pipeline_parallel_size": 2}),  # of one layer and of two
        (2, {"pipeline_parallel_size": 2}),
        (1, {"pipeline_parallel_size": 3, "kernels": "torch"}),
        (1, {"pipeline_parallel_size": 2, **OVER_TCP}),
    ],
    ids=["fused stack", "torch", "tp 2", "tp 2 over TCP", "pp 2", "tp 2 and pp 2", "pp 3, torch", "pp 2 over TCP"],
)
def test_tokens_are_those_of_a_large_cache(
    size: int, flags: dict[str, Any], model: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    given = f"host={sizes(model, 20)},disk={tmp_path}:{sizes(model, 300)}"
    with Served(model, size, kv_spill=given, **flags) as served:
        assert served.run_in_turn(PROMPTS) == expected
        before = served.stats.prefix_hits
        assert served.run(PROMPTS) == expected
        found = served.stats.prefix_hits - before
        assert found > len(PROMPTS) * 80 // 2, "most of what each prompt has in whole blocks"
        assert served.spill.host_hits > 0
        assert served.spill.disk_hits > 0
        assert served.spill.disk_faults == 0
        own = size * flags.get("pipeline_parallel_size", 1) if OVER_TCP.items() <= flags.items() else 1
        assert len(os.listdir(tmp_path)) == own, "ranks elsewhere have their own folders"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("flags", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "kv_cache_dtype": "int8"}])
def test_other_formats_of_the_cache(flags: dict[str, Any], model: Path) -> None:
    """Host memory alone. The stack computes the same bits from a cached prefix as without."""
    with Served(model, blocks=200, **flags) as served:
        expected = served.run(PROMPTS)
    with Served(model, kv_spill=f"host={sizes(model, 100)}", **flags) as served:
        assert [served.run(PROMPTS), served.run(PROMPTS)] == [expected, expected]
        assert served.spill.host_hits > 30
        assert served.spill.lost == 0


def test_groups_with_windows(tmp_path: Path) -> None:
    build_model("qwen2", tmp_path, head_dim=16, hidden_size=64)
    with Served(tmp_path, blocks=600) as served:
        expected = served.run(PROMPTS)
    for stages in (1, 2):
        given = f"host={sizes(tmp_path, 300)}"
        with Served(tmp_path, blocks=60, kv_spill=given, pipeline_parallel_size=stages) as served:
            assert [served.run(PROMPTS), served.run(PROMPTS)] == [expected, expected]
            assert served.spill.host_hits > 0


@pytest.mark.parametrize(("size", "flags"), [(1, {}), (2, OVER_TCP)], ids=["", "tp 2 over TCP"])
def test_damaged_files_are_computed_again(
    size: int, flags: dict[str, Any], model: Path, expected: list[list[int]], tmp_path: Path
) -> None:
    """Of several ranks, the parts of different blocks on each."""
    given = f"host={sizes(model, 16)},disk={tmp_path}:{sizes(model, 300)}"
    with Served(model, size, kv_spill=given, **flags) as served:
        assert served.run_in_turn(PROMPTS) == expected
        paths = sorted(tmp_path.glob(f"{PREFIX}*/*"))
        files = [path for path in paths if path.name != "owner.lock"]
        assert len(files) >= 30
        for number, path in enumerate(files):
            if number % 3 == 0:
                data = bytearray(path.read_bytes())
                data[len(data) * (number % 5) // 5] ^= 1
                path.write_bytes(data)
            elif number % 3 == 1:
                os.truncate(path, os.path.getsize(path) * (number % 4) // 4)
        assert served.run(PROMPTS) == expected
        assert served.spill.disk_faults > 0
        assert served.run(PROMPTS) == expected


def test_an_engine_starts_with_it_and_removes_its_files(tmp_path: Path) -> None:
    model, files = tmp_path / "model", tmp_path / "files"
    stale = files / f"{PREFIX}stale"
    for folder in (model, stale):
        folder.mkdir(parents=True)
    (stale / "owner.lock").touch()  # of a process that is gone
    write_tiny(model)
    size = sizes(model, 1)
    options = {
        "load_format": "dummy", "dtype": "float32", "block_size": BLOCK, "max_model_len": 128, "max_num_seqs": 2,
        "kv_cache_memory_bytes": BLOCKS * size,
    }  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    with LLM(str(model), **options) as llm:
        expected = [one.outputs[0].token_ids for one in llm.generate(PROMPTS, params)]
    with LLM(str(model), **options, kv_spill=f"host={40 * size},disk={files}:{300 * size}") as llm:
        assert [path.name != stale.name for path in files.glob(f"{PREFIX}*")] == [True]
        for _ in range(2):
            assert [one.outputs[0].token_ids for one in llm.generate(PROMPTS, params)] == expected
        assert len(list(files.glob(f"{PREFIX}*/*"))) > 1
    assert not os.listdir(files)


def test_a_folder_that_a_rank_elsewhere_can_not_use_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = f"host={sizes(model, 20)},disk={tmp_path / 'file' / 'below'}:1GiB"
    named = r"^rank \d \(process \d+\): --kv-spill disk=: .*/below can't be used: Not a directory"
    with pytest.raises(ConfigError, match=named), Served(model, 2, kv_spill=given, **OVER_TCP):
        pass


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("host=1", "host= is too small: a KV block has [0-9,]+ bytes"),
        ("host=1GiB,disk={folder}:1", "disk= is too small: a KV block has [0-9,]+ bytes"),
        ("host=900TiB", "host= is 900.0 TiB, but only .* of memory are free beside what the engine needs: lower"),
        ("host=64MiB,disk={file}/below:1GiB", "disk=: .*/below can't be used: Not a directory"),
    ],
)
def test_what_can_not_be_had_is_named(given: str, said: str, tmp_path: Path) -> None:
    write_tiny(tmp_path)
    spill = given.format(folder=tmp_path, file=tmp_path / "config.json")
    with pytest.raises(ConfigError, match=f"--kv-spill {said}"), Served(tmp_path, load_format="dummy", kv_spill=spill):
        pass


def test_a_folder_is_tried_before_weights_are_read(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # of no tensor
    spill = f"host=64MiB,disk={tmp_path / 'config.json' / 'below'}:1GiB"
    with pytest.raises(ConfigError, match="below can't be used: Not a directory"), LLM(str(tmp_path), kv_spill=spill):
        pass


def test_models_that_pool_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    config = EngineConfig(model=str(tmp_path), load_format="dummy", runner="pooling", kv_spill="host=1GiB")
    with pytest.raises(ConfigError, match="--kv-spill does not work with a model that pools"):
        resolve(config, read_model_info(config))
