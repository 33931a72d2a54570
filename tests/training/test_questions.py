"""Many questions about a picture in one sequence."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny import TINY
from training.questions import IGNORED, Asked, Chat, FrozenTextModel, tree

BEFORE = [5, 6, 7]
QUESTIONS = [
    Asked([10, 11, 12, 3], [20, 2]),
    Asked([10, 11, 13, 14, 3], [21, 22, 2]),
    Asked([10, 15, 3], [20, 2]),
    Asked([10, 11, 12, 4], [21, 22, 2]),
]


@pytest.fixture(scope="module")
def text() -> FrozenTextModel:
    torch.manual_seed(0)
    config = LlamaConfig(**{name: value for name, value in TINY.items() if name != "architectures"})
    return FrozenTextModel(LlamaForCausalLM(config), BEFORE)


def test_equal_beginnings_are_there_once() -> None:
    merged = tree(QUESTIONS[:2])
    assert merged.tokens.tolist() == [10, 11, 12, 3, 20, 13, 14, 3, 21, 22]
    assert merged.depth.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 5, 6]
    assert merged.labels.tolist() == [IGNORED] * 3 + [20, 2] + [IGNORED] * 2 + [21, 22, 2]
    assert merged.sees[9].nonzero().flatten().tolist() == [0, 1, 5, 6, 7, 8, 9]


def test_logits_are_those_of_one_question_after_another(text: FrozenTextModel) -> None:
    pictures = torch.randn(2, 4, TINY["hidden_size"])  # type: ignore[call-overload]
    found = text.answers(pictures, [tree(QUESTIONS), tree(QUESTIONS[2:])])
    for picture, questions in ((0, QUESTIONS), (1, QUESTIONS[2:])):
        for place, asked in enumerate(questions):
            ids = torch.tensor([*asked.prompt, *asked.answer[:-1]])
            parts = [text.embeddings[BEFORE], pictures[picture], text.embeddings[ids]]
            logits = text.model(inputs_embeds=torch.cat(parts)[None]).logits[0, -len(asked.answer) :]
            here = (found.pictures == picture) & (found.questions == place)
            assert found.labels[here].tolist() == asked.answer
            torch.testing.assert_close(found.logits[here], logits, atol=1e-5, rtol=1e-4)


def test_a_question_is_right_if_all_tokens_of_its_answer_are(text: FrozenTextModel) -> None:
    found = text.answers(torch.randn(1, 4, 32), [tree(QUESTIONS)])
    likeliest = found.logits.argmax(-1)
    one_wrong = likeliest.clone()
    one_wrong[(found.questions == 1).nonzero()[-1]] += 1
    judged = type(found)(found.logits, one_wrong, found.pictures, found.questions).right()
    assert judged == {(0, 0): True, (0, 1): False, (0, 2): True, (0, 3): True}


def test_gradients_reach_the_picture_and_not_the_model(text: FrozenTextModel) -> None:
    picture = torch.randn(1, 4, 32, requires_grad=True)
    text.answers(picture, [tree(QUESTIONS)]).loss().backward()
    assert picture.grad is not None
    assert (picture.grad != 0).all()
    assert all(parameter.grad is None for parameter in text.model.parameters())


def test_a_chat_ends_each_answer() -> None:
    chat = Chat(lambda text: [len(text)])
    asked = chat.asked("is it red?", "no")
    assert asked.prompt == [1, 10, len("<|im_end|>\n<|im_start|>assistant\n")]
    assert asked.answer == [2, len("<|im_end|>")]
