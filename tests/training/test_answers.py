"""The stage in which the connector learns from answers about pictures."""

from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import TINY
from training.answers import AnswerStep
from training.pictures import SIZE, Question, Split
from training.questions import Chat, FrozenTextModel
from training.stages import Stage, run_stage
from training.tower import Tower

WORDS: dict[str, int] = {}


def tokenize(text: str) -> list[int]:
    """An id for each word."""
    return [WORDS.setdefault(word, 10 + len(WORDS)) for word in text.split()]


def split() -> Split:
    pictures = np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in (10, 240)])
    questions = [Question("is it dark?", answer, picture) for picture, answer in enumerate(("yes", "no"))]
    none = np.zeros(2, np.int64)
    return Split(pictures, [], [*questions, questions[0]], none, none)


def test_only_the_connector_learns_to_tell_pictures_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{name: value for name, value in TINY.items() if name != "architectures"}, initializer_range=0.3
    )
    chat = Chat(tokenize)
    text = FrozenTextModel(LlamaForCausalLM(config), chat.before)
    tower = Tower(hidden=TINY["hidden_size"])  # type: ignore[arg-type]
    before = {name: value.clone() for name, value in tower.tower.state_dict().items()}
    step = AnswerStep(tower, split(), chat, text, seed=0)
    first = step(0).loss.item()
    run_stage(Stage("answers", steps=40, rate=0.02), tower.connector, step, tmp_path)
    assert step(0).loss.item() < first / 3
    for name, value in tower.tower.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)
