"""Stage 4: the connector learns from the answers of the text model to the questions about the training pictures.

The descriptions of stage 1 are trained on questions drawn evenly over their kinds. This stage asks all questions of a
picture, so that answers get the shares that they have in the data set, and it sees what the tower makes of real
pictures. Tower and text model stay as they are.
"""

import random
from collections import defaultdict

import torch

from training.pictures import Split
from training.questions import Chat, FrozenTextModel, tree
from training.stages import Outcome, Stage
from training.tower import Tower

STAGE = Stage("answers", steps=300, rate=3e-4)
PICTURES = 2  # of a step


class AnswerStep:
    """A step of stage 4, to be given to `run_stage` with the connector."""

    def __init__(self, tower: Tower, split: Split, chat: Chat, text: FrozenTextModel, seed: int) -> None:
        self._tower, self._split, self._chat, self._text, self._seed = tower, split, chat, text, seed
        self._questions: dict[int, dict[tuple[str, str], None]] = defaultdict(dict)  # each once, in their order
        for question in split.questions:
            self._questions[question.picture][question.text, question.answer] = None
        self._accuracy, self._steps = 0.0, 0

    def __call__(self, number: int) -> Outcome:
        choice = random.Random(f"{self._seed} {number}")
        pictures = choice.sample(sorted(self._questions), PICTURES)
        with torch.no_grad():
            patches = self._tower.patches(self._split.pictures[pictures])
        trees = [tree([self._chat.asked(*pair) for pair in self._questions[picture]]) for picture in pictures]
        answers = self._text.answers(self._tower.connector(patches), trees)
        right = list(answers.right().values())
        self._steps += 1
        self._accuracy += (sum(right) / len(right) - self._accuracy) / min(self._steps, 20)
        return Outcome(loss := answers.loss(), f"loss {loss.item():.3f}, right {self._accuracy:.2f}")
