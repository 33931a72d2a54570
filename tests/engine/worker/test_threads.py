"""Spinning is bounded, and the user has the last word."""

import os

import pytest

from engine.worker.threads import SPINS, bound_spinning


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, SPINS),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_the_bound_is_set_unless_the_user_chose(
    before: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    bound_spinning()
    assert os.environ.get("GOMP_SPINCOUNT") == after
