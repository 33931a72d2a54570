"""The loop of the training."""

from pathlib import Path

import pytest
import torch

from training.stages import Outcome, Stage, run_stage

STAGE = Stage("stage", steps=37, rate=0.05, decay=0.01)


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


def stepper(trained: torch.nn.Module, stop: int | None = None) -> object:
    def step(number: int) -> Outcome:
        if number == stop:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
        loss = (trained(inputs) - inputs[:, :2]).square().mean()
        return Outcome(loss, f"{loss.item():.3f}")

    return step


def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole, first, second = model(), model(), model()
    (tmp_path / "whole").mkdir()
    run_stage(STAGE, whole, stepper(whole), tmp_path / "whole")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        run_stage(STAGE, first, stepper(first, stop=27), tmp_path)  # type: ignore[arg-type]
    run_stage(STAGE, second, stepper(second), tmp_path)  # type: ignore[arg-type]
    for expected, found in zip(whole.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_finished_stage_is_not_run_again(tmp_path: Path) -> None:
    trained, loaded = model(), model()
    run_stage(STAGE, trained, stepper(trained), tmp_path)  # type: ignore[arg-type]
    run_stage(STAGE, loaded, stepper(loaded, stop=0), tmp_path)  # type: ignore[arg-type]
    torch.testing.assert_close(loaded.weight, trained.weight)
