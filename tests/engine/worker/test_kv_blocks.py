"""KV blocks copied to host blocks and back: a sequence continues on them as if it had never been away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.columns import column, int32s
from engine.host_blocks import ATTACH, HostBlocks
from engine.kernels.attention import Layout
from engine.kernels.cpu import build
from engine.messages import (
    COPY_IN,
    COPY_OUT,
    CopyingStep,
    Sampling,
    SlotAssignment,
    StepMessage,
    decode_copying_step,
    decode_result,
    decode_step,
    encode,
)
from engine.model.kv_groups import group_layers
from engine.model.runtime.attention_interface import KVCache
from engine.worker.device_kv_blocks import DeviceBlocks
from engine.worker.in_process import InProcessExecutor
from engine.worker.kv_blocks import CPUBlocks, cache_parts
from engine.worker.torch_device import TorchDevice
from tests.engine.worker.device_driver import configure, start_executor
from tests.engine.worker.driver import build_model
from tests.engine.worker.stand_in_device import StandInDevice

PROMPT = [(7 * i) % 120 + 1 for i in range(53)]
OTHER = [(11 * i) % 110 + 5 for i in range(53)]
NEW = 8
HOST_BLOCKS = 64

needs_kernels = pytest.mark.skipif(not build.supported_isas(), reason="the CPU kernels need AVX2 or NEON")

Copies = list[tuple[int, int, int]]


class Player:
    """Runs one request after the other, each with tables of its own, and copies what it is told."""

    def __init__(self, executor: InProcessExecutor, block_size: int, groups: int, host: HostBlocks):
        self.block_size, self.groups = block_size, groups
        self._executor, self._step, self._freed = executor, 0, b""
        executor.call(ATTACH, host.attachment).result()

    def tables(self, first: int) -> list[list[int]]:
        """Blocks for one request, from `first` on."""
        each = -(-(len(PROMPT) + NEW) // self.block_size)
        return [list(range(first + group * each, first + (group + 1) * each)) for group in range(self.groups)]

    def run(
        self, prompt: list[int], tables: list[list[int]], computed: int = 0, copies: Copies | None = None
    ) -> tuple[list[int], list[float]]:
        """Tokens and logprobs of a request, the KV of whose first `computed` tokens is in its blocks."""
        assigned = SlotAssignment(
            0, self._step, column(prompt), len(prompt), computed, tuple(map(column, tables)), Sampling(logprobs=0)
        )
        chunks, packed = column([[0, len(prompt) - computed]]), column(copies or [])
        tokens, logprobs = [], []
        for number in range(NEW):
            message = StepMessage(self._step)
            if number == 0:
                message = CopyingStep(self._step, self._freed, (assigned,), b"", chunks, block_copies=packed)
            self._executor.submit(encode(message)).result()
            result = decode_result(self._executor.sample(self._step).result())
            tokens += int32s(result.tokens).tolist()
            assert result.logprobs is not None
            logprobs.append(float(np.frombuffer(result.logprobs.values, "<f4")[0]))
            self._step += 1
        self._freed = column([0])
        return tokens, logprobs


def check(player: Player) -> None:
    """A request goes on from blocks that were copied out while another one overwrites them, and in elsewhere."""
    full = len(PROMPT) // player.block_size
    here, elsewhere, nowhere = (player.tables(first) for first in (1, 201, 401))
    hosts = [[1 + group * full + i for i in range(full)] for group in range(player.groups)]

    def copies(direction: int, tables: list[list[int]]) -> Copies:
        return [(direction, table[i], host[i]) for table, host in zip(tables, hosts, strict=True) for i in range(full)]

    expected = player.run(PROMPT, here)
    other = player.run(OTHER, here, copies=copies(COPY_OUT, here))
    again = player.run(PROMPT, elsewhere, full * player.block_size, copies(COPY_IN, elsewhere))
    empty = player.run(PROMPT, nowhere, full * player.block_size)
    assert again[0] == expected[0]
    assert again[1] == pytest.approx(expected[1], abs=1e-4)
    assert other[1] != pytest.approx(expected[1], abs=1e-3)
    assert empty[1] != pytest.approx(expected[1], abs=1e-3), "what is in the blocks makes no difference"


CPU_CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gpt2", "torch", {"block_size": 4}),
    ("gemma3_text", "torch", {"block_size": 4}),
    ("llama", "fused", {}),
    ("qwen2", "fused", {}),
    ("llama", "fused", {"dtype": "bfloat16"}),
    ("llama", "fused", {"dtype": "bfloat16", "kv_cache_dtype": "int8"}),
]


@needs_kernels
@pytest.mark.parametrize(("kind", "kernels", "options"), CPU_CASES)
def test_on_the_cpu(
    kind: str, kernels: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    build_model(kind, tmp_path, **({"head_dim": 16, "hidden_size": 64} if kernels == "fused" else {}))
    config, model_info, resolved = configure(tmp_path, **{"block_size": 16, **options})
    executor = InProcessExecutor(config, model_info, resolved)
    request.addfinalizer(executor.shutdown)
    assert kernels in executor.kernels
    host = HostBlocks(HOST_BLOCKS, (model_info.kv_bytes_per_token * resolved.block_size,))
    check(Player(executor, resolved.block_size, len(resolved.kv_windows), host))


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_on_a_device(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    build_model(kind, tmp_path)
    _, model_info, _ = configure(tmp_path)
    executor, resolved = start_executor(StandInDevice(), tmp_path)
    request.addfinalizer(executor.shutdown)
    host = HostBlocks(HOST_BLOCKS, (model_info.kv_bytes_per_token * resolved.block_size,))
    check(Player(executor, resolved.block_size, len(resolved.kv_windows), host))


def test_blocks_of_another_size_than_planned_are_refused(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    build_model("gpt2", tmp_path)
    config, model_info, resolved = configure(tmp_path)
    executor = InProcessExecutor(config, model_info, resolved)
    request.addfinalizer(executor.shutdown)
    size = model_info.kv_bytes_per_token * resolved.block_size
    with pytest.raises(RuntimeError, match=f"a KV block has {size} bytes on this rank, {size + 1} were planned"):
        Player(executor, resolved.block_size, 1, HostBlocks(HOST_BLOCKS, (size + 1,)))


# ----------------------------------------------------------------------------------------------------------- copies

BLOCKS, HOSTS, WIDTHS = 5, 4, (3, 2)
copy_lists = st.lists(
    st.tuples(st.sampled_from([COPY_IN, COPY_OUT]), st.integers(0, BLOCKS - 1), st.integers(0, HOSTS - 1)),
    min_size=1,
    max_size=12,
)


def on_cpu(parts: list[np.ndarray]) -> CPUBlocks:
    return CPUBlocks(parts, 1)


def on_device(parts: list[np.ndarray]) -> DeviceBlocks:
    return DeviceBlocks(TorchDevice("cpu"), [torch.from_numpy(part) for part in parts], 1)


@pytest.mark.parametrize("make", [on_cpu, on_device])
@given(copies=copy_lists)
def test_copies_are_executed_in_order(make: Callable[..., CPUBlocks | DeviceBlocks], copies: Copies) -> None:
    luck = np.random.default_rng(3)
    parts = [luck.integers(0, 256, (BLOCKS, width), np.uint8) for width in WIDTHS]
    cache = [b"".join(bytes(part[block]) for part in parts) for block in range(BLOCKS)]
    hosts = [bytes(sum(WIDTHS))] * HOSTS
    shared = HostBlocks(HOSTS, (7, sum(WIDTHS)))
    blocks = make(parts)
    blocks.attach(**shared.attachment)
    blocks.copy(int32s(column(copies), 3))
    for direction, block, host in copies:
        if direction == COPY_OUT:
            hosts[host] = cache[block]
        else:
            cache[block] = hosts[host]
    assert [b"".join(bytes(part[block]) for part in parts) for block in range(BLOCKS)] == cache
    assert [bytes(shared.parts(host)[1]) for host in range(HOSTS)] == hosts


@pytest.mark.parametrize("stored", [None, torch.int8, torch.float8_e4m3fn])
def test_the_parts_of_a_cache_are_all_of_it(stored: torch.dtype | None) -> None:
    """Also the scales of a cache in 8 bits."""
    layout = Layout(4, 2, 8, torch.bfloat16)
    cache = KVCache(group_layers([0, 0, 0]), 6, layout, lambda shape, dtype: torch.zeros(shape, dtype=dtype), stored)
    parts = cache_parts(cache)
    whole = [one for one in (*cache.keys, *cache.values, *cache.key_scales, *cache.value_scales) if one is not None]
    assert sum(part.nbytes for part in parts) == sum(one.nbytes for one in whole)
    assert all(part.shape[0] == 6 and part.dtype == torch.uint8 for part in parts)
    for part in parts:
        part[2] = 1
    assert all(bool((one[2].view(torch.uint8) == 1).all()) for one in whole), "they are views"
    assert not any(bool(one[3].view(torch.uint8).any()) for one in whole)


def test_a_step_without_copies_costs_no_byte() -> None:
    plain, copying = StepMessage(7, column([1])), CopyingStep(7, column([1]), block_copies=column([[COPY_OUT, 3, 4]]))
    assert decode_copying_step(encode(plain)).block_copies == b""
    assert decode_copying_step(encode(copying)) == copying
    assert decode_step(encode(copying)) == plain
    assert len(encode(copying)) == len(encode(plain)) + 2 + 12
