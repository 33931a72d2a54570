"""The loop that all stages of the training share: progress, learning rate, and checkpoints to go on from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SAVE_EVERY = 5
WARM_UP = 0.05


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the training.

    Attributes:
        name: of its checkpoint file.
        steps: of the optimizer.
        rate: the highest learning rate; it rises during the first 5 % of the steps and falls to zero afterwards.
        decay: of weights.
    """

    name: str
    steps: int
    rate: float
    decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The loss of a step, and what is shown beside it."""

    loss: torch.Tensor
    shown: str


def run_stage(stage: Stage, model: torch.nn.Module, step: Callable[[int], Outcome], folder: Path) -> None:
    """Train `model` in place, from its last checkpoint in `folder` on if there is one.

    Args:
        step: computes the loss of a step by its number. Its random choices depend on that number alone, so that a run
            that goes on from a checkpoint makes the same ones.
    """
    file = folder / f"{stage.name}.pt"
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=stage.rate, betas=(0.9, 0.98), weight_decay=stage.decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: _share_of_rate(at, stage.steps))
    done = 0
    if file.exists():
        saved = torch.load(file)
        model.load_state_dict(saved["model"])
        done = saved["step"]
        if done < stage.steps:
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
    columns = TextColumn(f"{stage.name:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("{task.fields[shown]}"), console=console) as progress:
        task = progress.add_task(stage.name, total=stage.steps, completed=done, shown="")
        for number in range(done, stage.steps):
            outcome = step(number)
            optimizer.zero_grad()
            outcome.loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, shown=outcome.shown)
            if (number + 1) % SAVE_EVERY == 0 or number + 1 == stage.steps:
                _save(file, model, optimizer, schedule, number + 1)
                if not console.is_terminal:
                    console.print(f"{stage.name} {number + 1}: {outcome.shown}")


def _share_of_rate(step: int, steps: int) -> float:
    rise = max(1.0, WARM_UP * steps)
    return min((step + 1) / rise, (steps - step) / (steps - rise) if steps > rise else 1.0)


def _save(
    file: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    step: int,
) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    scratch = file.with_suffix(".part")
    torch.save({**state, "step": step}, scratch)
    scratch.replace(file)
