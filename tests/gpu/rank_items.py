"""What one GPU can show of several ranks: that a rank joins over NCCL, and that its collectives can be captured."""

import time

import torch

from tests.gpu.environment import Environment

SHAPE = (64, 4096)  # the output of a layer for 64 tokens


def ranks(env: Environment) -> None:
    device = env.device
    began = time.monotonic()
    group = device.join(0, 1, str(env.folder / "ranks"))
    env.report.row("join", time.monotonic() - began, "s", note=type(group).__name__)
    total, gathered = device.zeros(SHAPE, torch.float32), device.zeros(SHAPE, torch.float32)

    def step() -> None:
        gathered.copy_(group.all_gather(group.all_reduce(total.add_(1))))

    again = device.capture(step)
    before = device.fetch(total).wait()
    again()
    passed = bool((device.fetch(gathered).wait() == before + 1).all())
    env.report.row("captured sum and gather of one rank", "right" if passed else "wrong", passed=passed)
    env.report.row("smallest", group.smallest(7), passed=group.smallest(7) == 7)
