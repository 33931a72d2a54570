"""Multimodal models through the worker equal plain transformers, whatever the schedule; and mistakes are seen."""

from pathlib import Path

import pytest

from engine.multimodal.families import MM_FAMILIES
from tests.engine.worker.mm_driver import Prompts, start
from tests.engine.worker.mm_models import MM_MODELS
from tests.engine.worker.mm_parity import (
    CASES,
    CHUNKED,
    NO_MROPE,
    SHIFTED,
    SWAPPED,
    MMReference,
    compare,
    rows_of,
    serve,
)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "gemma3/crops"])
def test_a_family_equals_transformers_and_mistakes_are_seen(kind: str, tmp_path: Path) -> None:
    rows = list(rows_of(kind, MM_MODELS[kind], tmp_path, ranks=(1,)))
    assert {row.case for row in rows} >= {*CASES, SWAPPED, SHIFTED}
    assert (NO_MROPE in {row.case for row in rows}) == (kind == "qwen3_vl")
    for row in rows:
        assert row.passed, row


def test_ranks_that_one_drives_get_the_embeddings(tmp_path: Path) -> None:
    entry = MM_MODELS["llava"]
    reference = MMReference(entry.build(tmp_path), entry)
    driver = start(tmp_path, 2, ablate=("driver-broadcast",))
    try:
        row = compare("llava", CHUNKED, serve(driver, Prompts(tmp_path, entry), CHUNKED), reference)
    finally:
        driver.executor.shutdown()
    assert row.passed, row


def test_the_suite_holds_only_known_families() -> None:
    assert {kind.partition("/")[0] for kind in MM_MODELS} <= set(MM_FAMILIES)
