import json
from pathlib import Path

import pytest

WORDS = ["red", "blue", "green", "fast", "slow", "cat", "dog", "tree", "house", "river"]


def sentence(number: int, words: int) -> str:
    """A text of its own for each number."""
    return " ".join([f"n{number}", *(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words - 1))])


@pytest.fixture
def sharegpt(tmp_path: Path) -> Path:
    """Forty conversations of 30 + number % 5 words, answered with 6 + number % 3."""
    path = tmp_path / "sharegpt.json"
    rows = [
        {
            "id": str(i),
            "conversations": [
                {"from": "human", "value": sentence(i, 30 + i % 5)},
                {"from": "gpt", "value": sentence(100 + i, 6 + i % 3)},
                {"from": "human", "value": "and then?"},
            ],
        }
        for i in range(40)
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict] = [{"prompt": sentence(i, 30), "output_tokens": 3 + i % 2} for i in range(20)]
    rows += [{"messages": [{"role": "user", "content": sentence(50 + i, 30)}]} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
