"""Spinning and kernels kept are bounded, and the user has the last word."""

import os

import pytest

from engine.worker.threads import KERNELS_KEPT, SPINS, limit_libraries


@pytest.mark.parametrize(
    ("before", "spins", "kernels"),
    [
        ({}, SPINS, KERNELS_KEPT),
        ({"GOMP_SPINCOUNT": "7"}, "7", KERNELS_KEPT),
        ({"OMP_WAIT_POLICY": "active"}, None, KERNELS_KEPT),
        ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "9"}, SPINS, "9"),
    ],
)
def test_a_limit_is_set_unless_the_user_chose(
    before: dict[str, str], spins: str | None, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    limit_libraries()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == kernels
