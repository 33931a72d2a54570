"""Lines of the start table."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from cli.start_table import inputs, quantized, show_start
from engine.config import EngineConfig
from engine.messages import Ready


def ready(**fields: Any) -> Ready:
    return Ready("models/m", "cpu", "bfloat16", 100, 64, 8, 128, 32, 10, True, **fields)


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({}, []),
        ({"quantization": "int8"}, ["int8"]),
        ({"quantization": "int4", "kv_cache_dtype": "fp8"}, ["int4; the head int8", "fp8"]),
    ],
)
def test_quantized_weights_and_caches_have_lines(fields: dict[str, str], lines: list[str]) -> None:
    assert [value for _, value, _ in quantized(ready(**fields))] == lines


def test_the_table_shows_them() -> None:
    console = Console(file=io.StringIO(), width=150)
    engine = SimpleNamespace(
        ready=ready(quantization="fp8", kv_cache_dtype="int8"),
        config=EngineConfig(model="m"),
        generation=SimpleNamespace(sampling={}),
        warnings=(),
        mm=None,
    )
    show_start(console, engine)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "linear layers" in text
    assert "--kv-cache-dtype" in text


@pytest.mark.parametrize(
    ("mm", "lines"),
    [
        (None, []),
        (SimpleNamespace(processes=1, cache_bytes=4 << 30), ["at most 4.0 GiB of shared memory", "1 process"]),
        (SimpleNamespace(processes=2, cache_bytes=0), ["off", "2 processes"]),
    ],
)
def test_the_table_shows_how_inputs_are_processed(mm: Any, lines: list[str]) -> None:
    assert [value for _, value, _ in inputs(SimpleNamespace(mm=mm))] == lines
