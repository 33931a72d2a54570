"""Stage 1: for each shape and color, the embeddings that let the frozen text model answer questions about it.

No picture is computed here. A description has one embedding for each patch of a picture. Squares of 4 x 4 patches
repeat 16 vectors, each the sum of three: one of all pictures, one of the shape, one of the color. They begin as the
embeddings of the words for the color and the shape, in turn, so that the text model finds the words of questions again,
and are trained through it. The connector then has to produce them from pictures (`training/tower.py`).
"""

import random
from collections.abc import Sequence

import torch

from training.pictures import COLORS, SHAPES, UNKNOWN, Split
from training.questions import Chat, FrozenTextModel, tree
from training.stages import Outcome, Stage

STAGE = Stage("descriptions", steps=200, rate=3e-3)
GRID, SQUARE = 8, 4  # patches a side
FASTER = 3.0  # the vectors of all pictures are trained at this multiple of the rate, since they begin as noise
PICTURES, QUESTIONS = 1, 12  # of a step
NOISE = 0.02  # added to descriptions, since the connector won't meet them exactly
WHAT, FITTING = 0.2, 0.2  # shares of questions that ask for a name, and that name the right shape or color


class Descriptions(torch.nn.Module):
    """Embeddings of pictures by what they show.

    Args:
        shapes: [shapes, hidden] embeddings of the words for the shapes.
        colors: [colors, hidden] embeddings of the words for the colors.
    """

    def __init__(self, shapes: torch.Tensor, colors: torch.Tensor) -> None:
        super().__init__()
        at = torch.arange(GRID) % SQUARE
        self._kinds = (at[:, None] * SQUARE + at[None, :]).flatten()
        count, hidden = SQUARE * SQUARE, shapes.shape[1]
        self.base = torch.nn.Parameter(NOISE / FASTER * torch.randn(count, hidden))
        self.shape = torch.nn.Parameter(torch.zeros(len(shapes), count, hidden))
        self.color = torch.nn.Parameter(torch.zeros(len(colors), count, hidden))
        with torch.no_grad():
            self.color[:, 0::2] = colors[:, None]
            self.shape[:, 1::2] = shapes[:, None]

    def forward(self, shapes: torch.Tensor, colors: torch.Tensor) -> torch.Tensor:
        """Descriptions [n, 64, hidden] of shapes [n] and colors [n]."""
        vectors = FASTER * self.base + self.shape[shapes] + self.color[colors]
        return vectors[:, self._kinds]


class Bank:
    """The questions that the data set asks about each shape and color, and draws of them."""

    def __init__(self, split: Split) -> None:
        facts: dict[tuple[int, int], set[tuple[str, str]]] = {}
        for question in split.questions:
            seen = int(split.shapes[question.picture]), int(split.colors[question.picture])
            if UNKNOWN not in seen:
                facts.setdefault(seen, set()).add((question.text, question.answer))
        self.seen = sorted(facts)
        self._kinds = {seen: self._by_kind(sorted(pairs), *seen) for seen, pairs in facts.items()}

    @staticmethod
    def _by_kind(pairs: list[tuple[str, str]], shape: int, color: int) -> list[list[tuple[str, str]]]:
        names = {SHAPES[shape], COLORS[color]}
        what = [pair for pair in pairs if pair[1] in names]
        fitting = [pair for pair in pairs if pair not in what and names & set(pair[0].rstrip("?").split())]
        return [what, fitting, [pair for pair in pairs if pair not in what and pair not in fitting]]

    def draw(self, seen: tuple[int, int], count: int, choice: random.Random) -> list[tuple[str, str]]:
        """At most `count` different questions and answers about a shape and color."""
        shares = WHAT, FITTING, 1 - WHAT - FITTING
        kinds = choice.choices(self._kinds[seen], shares, k=count)
        return list(dict.fromkeys(choice.choice(kind) for kind in kinds))


def word_embeddings(words: Sequence[str], chat: Chat, text: FrozenTextModel) -> torch.Tensor:
    """[words, hidden]; of a word of several tokens, their mean."""
    return torch.stack([text.embeddings[chat.tokens(" " + word)].mean(0) for word in words])


class DescriptionStep:
    """A step of stage 1, to be given to `run_stage`."""

    def __init__(self, descriptions: Descriptions, split: Split, chat: Chat, text: FrozenTextModel, seed: int) -> None:
        self._descriptions, self._chat, self._text, self._seed = descriptions, chat, text, seed
        self._bank = Bank(split)
        self._accuracy = 0.0

    def __call__(self, number: int) -> Outcome:
        choice = random.Random(f"{self._seed} {number}")
        torch.manual_seed(choice.getrandbits(32))
        seen = choice.choices(self._bank.seen, k=PICTURES)
        shapes, colors = (torch.tensor(part) for part in zip(*seen, strict=True))
        pictures = self._descriptions(shapes, colors)
        drawn = [self._bank.draw(one, QUESTIONS, choice) for one in seen]
        trees = [tree([self._chat.asked(*pair) for pair in pairs]) for pairs in drawn]
        answers = self._text.answers(pictures + NOISE * torch.randn_like(pictures), trees)
        right = list(answers.right().values())
        self._accuracy += 0.1 * (sum(right) / len(right) - self._accuracy)
        return Outcome(loss := answers.loss(), f"loss {loss.item():.3f}, right {self._accuracy:.2f}")
