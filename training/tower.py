"""Stages 2 and 3: the vision tower learns what pictures show, then tower and connector learn the descriptions.

Stage 2 trains the tower alone. Each patch's output has to tell the shape and the color of the whole picture, how much
of the patch the shape covers, and the shape's size and place; the linear layer that reads these is dropped afterwards.
Stage 3 adds the connector, whose outputs have to be the description of what the picture shows. Neither runs the text
model.
"""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from training.descriptions import Descriptions
from training.pictures import COLORS, SHAPES, UNKNOWN, SceneMaker, Scenes, Split
from training.stages import Outcome, Stage

SEEING = Stage("tower", steps=1000, rate=4e-3, decay=0.02)
CONNECTING = Stage("connector", steps=350, rate=2e-3, decay=0.0)
BATCH = 64
PATCH = 8
TOWER: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_act": "gelu",
    "hidden_size": 64,
    "image_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "patch_size": PATCH,
    "projection_dim": 64,
}
LAYER = -1
"""Of the tower, whose output the connector takes."""
READ = len(SHAPES) + len(COLORS) + 1 + 5
"""Values that stage 2 reads from each patch."""


class Connector(torch.nn.Module):
    """LLaVA's connector, with the names of its parameters.

    Args:
        seen: values of a patch in the tower.
        hidden: of the text model.
    """

    def __init__(self, seen: int, hidden: int) -> None:
        super().__init__()
        self.linear_1 = torch.nn.Linear(seen, hidden)
        self.linear_2 = torch.nn.Linear(hidden, hidden)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.linear_2(functional.gelu(self.linear_1(patches)))
        return output


class Tower(torch.nn.Module):
    """The vision tower, the layer of stage 2 that reads its output, and the connector."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel

        options = {name: value for name, value in TOWER.items() if name != "model_type"}
        self.tower: Any = CLIPVisionModel(CLIPVisionConfig(**options))
        _initialize(self.tower)
        width = int(options["hidden_size"])
        self.reader = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, READ))
        self.connector = Connector(width, hidden)

    def patches(self, pictures: np.ndarray) -> torch.Tensor:
        """The tower's output [n, patches, width] for pictures [n, 64, 64, 3] of values 0 to 255."""
        return self.tower_output(pixels(pictures))

    def tower_output(self, values: torch.Tensor) -> torch.Tensor:
        """The same for values [n, 3, 64, 64] of the image processor."""
        outputs = self.tower(pixel_values=values, output_hidden_states=True)
        patches: torch.Tensor = outputs.hidden_states[LAYER][:, 1:]
        return patches


def pixels(pictures: np.ndarray) -> torch.Tensor:
    """As the image processor of the checkpoint gives them: -1 to 1, channels first."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def _initialize(tower: torch.nn.Module) -> None:
    """Larger weights than those of transformers, which suit wide towers."""
    for name, value in tower.named_parameters():
        if "patch_embedding" in name:
            torch.nn.init.normal_(value, std=1.5 / value[0].numel() ** 0.5)
        elif "position" in name or "class" in name:
            torch.nn.init.normal_(value, std=0.3)
        elif value.dim() == 2:
            narrow = 0.5 if "out_proj" in name or "fc2" in name else 1.0
            torch.nn.init.normal_(value, std=narrow / value.shape[1] ** 0.5)


class SceneStep:
    """What the steps of both stages share: random pictures, and the loss of what is read from the tower."""

    def __init__(self, tower: Tower, split: Split, seed: int) -> None:
        self.tower, self._split, self._seed = tower, split, seed
        self._maker = SceneMaker(split.pictures)
        self._known = np.flatnonzero((split.shapes != UNKNOWN) & (split.colors != UNKNOWN))

    def scenes(self, number: int, stage: Stage) -> tuple[Scenes, torch.Tensor, torch.Tensor]:
        """Pictures of a step, their shapes and their colors."""
        random = np.random.default_rng([self._seed, number, len(stage.name)])
        indices = random.choice(self._known, size=BATCH)
        shapes, colors = (torch.from_numpy(one[indices]) for one in (self._split.shapes, self._split.colors))
        return self._maker.make(indices, random), shapes, colors

    def reading(self, patches: torch.Tensor, scenes: Scenes, shapes: torch.Tensor, colors: torch.Tensor) -> Outcome:
        count = patches.shape[1]
        read = self.tower.reader(patches)
        shape, color, covered, place = read.split([len(SHAPES), len(COLORS), 1, 5], -1)
        losses = (
            functional.cross_entropy(shape.flatten(0, 1), shapes.repeat_interleave(count)),
            functional.cross_entropy(color.flatten(0, 1), colors.repeat_interleave(count)),
            functional.mse_loss(covered[..., 0], torch.from_numpy(scenes.coverage(PATCH))),
            functional.mse_loss(place, torch.from_numpy(scenes.geometry())[:, None].expand_as(place)),
        )
        loss = losses[0] + 0.5 * losses[1] + 3 * losses[2] + 2 * losses[3]
        return Outcome(loss, f"loss of shapes {losses[0].item():.3f}, of colors {losses[1].item():.3f}")


class SeeingStep(SceneStep):
    """A step of stage 2, to be given to `run_stage`."""

    def __call__(self, number: int) -> Outcome:
        scenes, shapes, colors = self.scenes(number, SEEING)
        return self.reading(self.tower.patches(scenes.pictures), scenes, shapes, colors)


class ConnectingStep(SceneStep):
    """A step of stage 3, to be given to `run_stage`.

    Args:
        descriptions: of stage 1; they stay as they are.
    """

    def __init__(self, tower: Tower, split: Split, descriptions: Descriptions, seed: int) -> None:
        super().__init__(tower, split, seed)
        self._descriptions = descriptions.requires_grad_(False)

    def __call__(self, number: int) -> Outcome:
        scenes, shapes, colors = self.scenes(number, CONNECTING)
        patches = self.tower.patches(scenes.pictures)
        wanted = self._descriptions(shapes, colors)
        error = (self.tower.connector(patches) - wanted).square().mean() / wanted.var()
        return Outcome(error + 0.1 * self.reading(patches, scenes, shapes, colors).loss, f"error {error.item():.4f}")


def seen_right(tower: Tower, split: Split) -> tuple[float, float]:
    """Shares of pictures whose shape, and whose color, the reading layer tells right."""
    with torch.no_grad():
        parts = np.array_split(split.pictures, max(1, len(split.pictures) // 200))
        read = torch.cat([tower.reader(tower.patches(part)).mean(1) for part in parts]).numpy()
    of_shapes, of_colors = np.split(read[:, : len(SHAPES) + len(COLORS)], [len(SHAPES)], axis=1)
    found = ((of_shapes, split.shapes), (of_colors, split.colors))
    shares = [float((values.argmax(1) == labels)[labels != UNKNOWN].mean()) for values, labels in found]
    return shares[0], shares[1]
