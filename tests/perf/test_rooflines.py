"""Rooflines against figures that are known for Llama-3.1-8B."""

import pytest

from tests.perf.rooflines import Model, chunks, decode_step, kernels, workloads


def test_sizes_of_the_model() -> None:
    model = Model()
    assert model.weight_bytes == pytest.approx(16.06e9, rel=1e-3)
    assert model.token_bytes == 131072
    assert model.cache_tokens == pytest.approx(449e3, rel=5e-3)


def test_a_decode_step() -> None:
    step = decode_step(Model(), 64, 1500)
    assert step["weights"] == pytest.approx(5.00e-3, rel=2e-3)
    assert step["kv"] == pytest.approx(4.19e-3, rel=2e-3)
    assert step["roofline"] == pytest.approx(step["weights"] + step["kv"])
    assert step["roofline"] < step["expected"] < 2 * step["roofline"]


def test_products_of_a_decode_step_read_all_weights() -> None:
    model = Model()
    step = kernels(model, 1, 1, 0)
    weights = sum(work.bytes * work.launches for work in step if "product" in work.kernel or work.kernel == "head")
    assert weights == pytest.approx(model.itemsize * model.parameters, rel=1e-3)
    assert all(work.bound == "bandwidth" for work in step)


def test_attention_reads_the_cache_once() -> None:
    model = Model()
    attention = next(work for work in kernels(model, 64, 1, 1499) if work.kernel == "attention")
    assert attention.bytes * model.layers == pytest.approx(64 * 1500 * model.token_bytes, rel=0.01)


def test_long_prompts_are_bound_by_products() -> None:
    bound = {work.kernel: work.bound for work in kernels(Model(), 1, 2048, 4096)}
    assert bound["attention"] == bound["down product"] == "products"
    assert bound["norm"] == "bandwidth"


def test_rates_fall_with_the_length_and_stay_below_the_roofline() -> None:
    rows = workloads(Model())
    assert all(row["rate_expected"] < row["rate_roofline"] for row in rows)
    assert rows[0]["rate_expected"] == pytest.approx(2.67, rel=0.01)


def test_slower_attention_costs_little_beside_products_at_short_contexts() -> None:
    first, *_, longest = (row for row in chunks(Model()) if row["tokens"] == 2048)
    assert (first["triton"] - first["flash"]) / first["products"] < 0.03
    assert (longest["triton"] - longest["flash"]) / longest["products"] > 0.3
