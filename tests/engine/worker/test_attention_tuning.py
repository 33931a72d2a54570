"""The attention kernels as they are tuned: interpreted, on the stand-in device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from triton.runtime.errors import OutOfResources

from engine.devices.tile_files import read_table, write_table
from engine.errors import ConfigError
from engine.kernels.tile_table import Launch, Tile
from engine.kernels.triton import launch
from engine.kernels.triton.attention import AttentionShape
from engine.kernels.triton.tiles import INTERPRETED_GPU, INTERPRETER, TILES
from engine.worker import attention_tuning, tile_tuning
from engine.worker.attention_tuning import AttentionMeasure, AttentionTask, TunedShape, table_of, tune_attention
from engine.worker.tile_tuning import DeviceTimer, Workload
from engine.worker.triton_backend import default_tilings
from tests.engine.kernels.triton import quick
from tests.engine.worker.stand_in_device import StandInDevice

quick.patch()

SHAPE = AttentionShape(4, 2, 16, 8)
TUNED = TunedShape(SHAPE, torch.float32)
DECODE, PREFILL = Workload(2, 1, 40), Workload(1, 20, 5)
BUILTIN_DECODE, BUILTIN_PREFILL = TILES[INTERPRETER][64]

Result = TypeVar("Result")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[StandInDevice], Result]], Result]:
    """Runs a function in the thread of a stand-in device."""
    device = StandInDevice()
    monkeypatch.setattr(launch, "place_of", device.place_of)

    def run(work: Callable[[StandInDevice], Result]) -> Result:
        def bound() -> Result:
            device.bind_thread()
            with torch.inference_mode():
                return work(device)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(bound).result()

    return run


def test_two_tiles_are_measured_by_the_devices_clock(on_device: Callable[..., float | None]) -> None:
    def work(device: StandInDevice) -> list[float | None]:
        measure = AttentionMeasure(
            "decode", TUNED, INTERPRETED_GPU, lambda one: AttentionTask(device, TUNED, one, 1), DeviceTimer(device, 1)
        )
        assert measure.builtin == BUILTIN_DECODE
        return [measure(tile, DECODE) for tile in (measure.builtin, replace(measure.builtin, keys=16))]

    times = on_device(work)
    assert all(seconds is not None and seconds > 0 for seconds in times)  # type: ignore[union-attr]


@pytest.mark.parametrize("quantized", [False, True])
def test_the_fastest_tiles_become_a_table_that_steps_use(
    on_device: Callable[..., dict[Launch, tile_tuning.Choice]],
    quantized: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    wanted: dict[Launch, Tile] = {
        "decode": replace(BUILTIN_DECODE, keys=16), "prefill": replace(BUILTIN_PREFILL, lines=32, keys=32),
    }  # fmt: skip
    monkeypatch.setattr(attention_tuning, "candidates", lambda one, *_: [wanted[one]])
    monkeypatch.setattr(tile_tuning, "PROGRAMS", (1, 2))
    times = iter([2e-3, 1e-3, 3e-3] * 2)
    shown: list[tuple[int, int]] = []
    tuned = replace(TUNED, quantized=quantized, dtype=torch.float16)

    def work(device: StandInDevice) -> dict[Launch, tile_tuning.Choice]:
        return tune_attention(
            device, tuned, INTERPRETED_GPU, lambda _: next(times), lambda done, total, _: shown.append((done, total)),
            workloads={"decode": (DECODE,), "prefill": (PREFILL,)}, cache_bytes=1,
        )  # fmt: skip

    choices = on_device(work)
    assert {one: choice.tile for one, choice in choices.items()} == wanted
    assert shown == [(done, 8) for done in range(1, 7)]
    file = tmp_path / "tiles.yaml"
    write_table(file, table_of(choices, tuned, INTERPRETER))
    assert set(read_table(file).tiles) == {
        ("8-bit cache" if quantized else "16-bit", 16, one) for one in ("decode", "prefill")
    }
    made = default_tilings(SHAPE, 2, quantized=quantized, tile_table=str(file))
    assert (made.decode.keys, made.prefill.keys, made.prefill.queries) == (16, 32, 16)
    assert default_tilings(SHAPE, 2, quantized=not quantized, tile_table=str(file)).decode.keys == 64


def test_a_table_for_another_target_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tiles.yaml"
    file.write_text("target: sm_90\ntiles: []\n")
    with pytest.raises(ConfigError, match="target is sm_90, and this GPU is interpreter"):
        default_tilings(SHAPE, 2, tile_table=str(file))


def test_wrong_results_and_tiles_that_do_not_fit_are_left_out(
    on_device: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(device: StandInDevice) -> None:
        task = AttentionTask(device, TUNED, DECODE, 1)
        measure = AttentionMeasure("decode", TUNED, INTERPRETED_GPU, lambda _: task, lambda _: 1e-3)
        assert measure(BUILTIN_DECODE, DECODE) == 1e-3
        prepare = task.prepare

        def wrong(tilings: object) -> Callable[[int], None]:
            run = prepare(tilings)  # type: ignore[arg-type]

            def with_error(number: int) -> None:
                run(number)
                task._out[1, 2, 3] += 0.1

            return with_error

        monkeypatch.setattr(task, "prepare", wrong)
        assert measure(BUILTIN_DECODE, DECODE) is None
        monkeypatch.setattr(task, "prepare", lambda _: lambda _: None)  # nothing is computed
        assert measure(BUILTIN_DECODE, DECODE) is None

        def too_large(_: object) -> Callable[[int], None]:
            raise OutOfResources(300_000, 232_448, "shared memory")

        monkeypatch.setattr(task, "prepare", too_large)
        assert measure(BUILTIN_DECODE, DECODE) is None

    on_device(work)


def test_where_one_token_fills_a_large_tile_decode_has_the_tile_of_prefill(
    on_device: Callable[..., dict[Launch, tile_tuning.Choice]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_tuning, "candidates", lambda *_: [])
    monkeypatch.setattr(tile_tuning, "PROGRAMS", ())
    tuned = TunedShape(AttentionShape(64, 1, 16, 8), torch.float32)

    def work(device: StandInDevice) -> dict[Launch, tile_tuning.Choice]:
        return tune_attention(
            device, tuned, INTERPRETED_GPU, lambda _: 1e-3, lambda *_: None,
            workloads={"prefill": (Workload(1, 3, 0),)}, cache_bytes=1,
        )  # fmt: skip

    assert set(on_device(work)) == {"prefill"}
