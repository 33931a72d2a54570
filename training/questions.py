"""Many questions about one picture as one sequence of the text model.

Questions that begin with the same tokens share them, and each token sees only the picture and the tokens before it in
its own question. A sequence thus costs a fraction of asking one question after another and gives the same logits:

    picture ── is there ┬─ a red shape? … yes
                        └─ not a ┬─ circle? … no
                                 └─ blue shape? … yes
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100
"""Label of a token behind which nothing has to be predicted."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as tokens: those before the answer, and those of the answer with the token that ends it."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class Tree:
    """The tokens of several questions, those at equal beginnings once.

    Attributes:
        tokens: [n] ids.
        depth: [n] tokens before each one in its question.
        sees: [n, n] whether row's token sees column's.
        labels: [n] the token that has to follow, or IGNORED.
        question: [n] index of the question that a label belongs to.
    """

    tokens: torch.Tensor
    depth: torch.Tensor
    sees: torch.Tensor
    labels: torch.Tensor
    question: torch.Tensor


def tree(questions: Sequence[Asked]) -> Tree:
    """Merge questions that are all different and whose answers follow from what was asked."""
    nodes: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    labels: list[int] = []
    owner: list[int] = []
    for index, asked in enumerate(questions):
        at = -1
        for place, token in enumerate([*asked.prompt, *asked.answer[:-1]]):
            if (at, token) not in nodes:
                nodes[at, token] = len(tokens)
                tokens.append(token)
                parents.append(at)
                labels.append(IGNORED)
                owner.append(index)
            at = nodes[at, token]
            if place >= len(asked.prompt) - 1:
                labels[at] = asked.answer[place - len(asked.prompt) + 1]
    depth, sees = [0] * len(tokens), torch.eye(len(tokens), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
            depth[node] = depth[parent] + 1
    return Tree(torch.tensor(tokens), torch.tensor(depth), sees, torch.tensor(labels), torch.tensor(owner))


class FrozenTextModel:
    """The text model, its weights fixed, behind the part of a chat that comes before the picture.

    Args:
        model: a `LlamaForCausalLM` in float32.
        before: token ids before the picture, the same in all chats.
    """

    def __init__(self, model: Any, before: list[int]) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.embeddings: torch.Tensor = model.get_input_embeddings().weight
        self._before = len(before)
        with torch.no_grad():
            cache = self.model.model(input_ids=torch.tensor([before]), use_cache=True).past_key_values
        self._keys_values = [(layer.keys, layer.values) for layer in cache.layers]

    def answers(self, pictures: torch.Tensor, trees: Sequence[Tree]) -> "Answers":
        """Logits of the tokens that have to be predicted.

        Args:
            pictures: [pictures, tokens, hidden] embeddings of pictures.
            trees: the questions about each picture.
        """
        count, span = pictures.shape[:2]
        longest = max(len(tree.tokens) for tree in trees)
        ids = torch.zeros(count, longest, dtype=torch.long)
        labels, owner = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        positions = self._before + torch.arange(span + longest).repeat(count, 1)
        sees = torch.zeros(count, 1, span + longest, self._before + span + longest, dtype=torch.bool)
        sees[..., : self._before] = True
        sees[:, 0, :, self._before : self._before + span] = torch.ones(span + longest, span).tril().bool()
        for row, tree in enumerate(trees):
            n = len(tree.tokens)
            ids[row, :n], labels[row, :n], owner[row, :n] = tree.tokens, tree.labels, tree.question
            positions[row, span : span + n] = self._before + span + tree.depth
            sees[row, 0, span : span + n, self._before + span : self._before + span + n] = tree.sees
        hidden = self._forward(torch.cat([pictures, self.embeddings[ids]], 1), positions, sees)[:, span:]
        at = labels != IGNORED
        rows = torch.arange(count)[:, None].expand_as(owner)
        return Answers(self.model.lm_head(hidden[at]), labels[at], rows[at], owner[at])

    def _forward(self, inputs: torch.Tensor, positions: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self._keys_values):
            cache.update(*(part.expand(len(inputs), -1, -1, -1) for part in (keys, values)), layer)
        mask = torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))
        output = self.model.model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True, slots=True)
class Answers:
    """What the text model predicts for the tokens of all answers.

    Attributes:
        logits: [n, vocabulary].
        labels, pictures, questions: [n] the right token, and the picture and question that it belongs to.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    pictures: torch.Tensor
    questions: torch.Tensor

    def loss(self) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.logits, self.labels)

    def right(self) -> dict[tuple[int, int], bool]:
        """By picture and question: all tokens of the answer are the likeliest ones."""
        result: dict[tuple[int, int], bool] = {}
        good = (self.logits.argmax(-1) == self.labels).tolist()
        for picture, question, token in zip(self.pictures.tolist(), self.questions.tolist(), good, strict=True):
            result[picture, question] = result.get((picture, question), True) and token
        return result


Tokenize = Callable[[str], list[int]]


class Chat:
    """Turns questions into tokens in the format of SmolLM2's chats.

    Args:
        tokenize: text to ids, special tokens recognized and none added.
    """

    SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

    def __init__(self, tokenize: Tokenize) -> None:
        self.tokens = tokenize
        self.before = tokenize(f"<|im_start|>system\n{self.SYSTEM}<|im_end|>\n<|im_start|>user\n")
        self._end = tokenize("<|im_end|>")
        self._turn = tokenize("<|im_end|>\n<|im_start|>assistant\n")
        self._known: dict[tuple[str, str], Asked] = {}

    def asked(self, text: str, answer: str) -> Asked:
        if (text, answer) not in self._known:
            prompt = [*self.tokens("\n"), *self.tokens(text), *self._turn]
            self._known[text, answer] = Asked(prompt, [*self.tokens(answer), *self._end])
        return self._known[text, answer]
