"""Recorded texts: ShareGPT's format with recorded lengths, JSONL with prompts and messages."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.workloads import make_workload
from bench.workloads.encoding import local_encoder, local_tokenizer, tokenizer_size


def encode(texts: list[str]) -> list[list[int]]:
    return [[sum(word.encode()) for word in text.split()] for text in texts]


def test_sharegpt_has_the_recorded_lengths(sharegpt: Path) -> None:
    workload = make_workload({"kind": "sharegpt", "dataset": str(sharegpt)}, None, encode)
    specs = workload.requests(40, 1)
    lengths = sorted((spec.input_tokens, spec.output_tokens) for spec in specs)
    assert lengths == sorted((30 + i % 5, 6 + i % 3) for i in range(40))
    assert all(len(spec.prompt_ids or []) == spec.input_tokens for spec in specs)
    assert workload.requests(90, 1)[:40] == specs
    assert workload.requests(40, 2) != specs
    assert workload.max_tokens == 2048
    assert make_workload(workload.describe(), None, encode).requests(40, 1) == specs


def test_sharegpt_leaves_out_what_is_too_long_and_can_send_it_untouched(sharegpt: Path) -> None:
    spec = {"kind": "sharegpt", "dataset": str(sharegpt), "max_input": 32, "max_tokens": 39, "fresh": False}
    specs = make_workload(spec, None, encode).requests(100, 1)
    assert max(s.input_tokens for s in specs) == 32
    assert max(s.input_tokens + s.output_tokens for s in specs) <= 39
    texts = [row["conversations"][0]["value"] for row in json.loads(sharegpt.read_text())]
    assert all(s.prompt_ids in encode(texts) for s in specs)


def test_sharegpt_rows_that_are_no_conversations(tmp_path: Path) -> None:
    said = [{"from": "system", "value": "s"}, {"from": "human", "value": "a b c d e"}]
    rows: list[Any] = [
        {"conversations": []},
        {"conversations": said},
        {"conversations": [{"from": "gpt", "value": "first"}, *said]},
        {"conversations": [*said, {"from": "gpt", "value": "f g h i"}]},
        {"conversation": [{"role": "user", "content": "a b c d"}, {"role": "assistant", "content": "e f g h"}]},
        {"text": "x"},
    ]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(rows))
    specs = make_workload({"kind": "sharegpt", "dataset": str(path)}, None, encode).requests(2, 0)
    assert sorted((s.input_tokens, s.output_tokens) for s in specs) == [(4, 4), (5, 4)]
    path.write_text(json.dumps(rows[:3]))
    with pytest.raises(BenchError, match=r"none of the 3 rows .*--dataset"):
        make_workload({"kind": "sharegpt", "dataset": str(path)}, None, encode).requests(1, 0)
    with pytest.raises(BenchError, match="--tokenizer"):
        make_workload({"kind": "sharegpt", "dataset": str(path)}, None).requests(1, 0)


def test_jsonl_sends_prompts_ids_and_messages(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "tell me", "output_tokens": 5},
        {"prompt": [300, 301, 302, 303, 304, 305], "output_tokens": 6},
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    spec = {"kind": "jsonl", "dataset": str(path), "output": 9}
    plain = make_workload(spec | {"fresh": False}, None).requests(3, 0)
    assert sorted(s.output_tokens for s in plain) == [5, 6, 9]
    assert [s.prompt_text for s in plain if s.prompt_text] == ["tell me"]
    assert [s.prompt_ids for s in plain if s.prompt_ids] == [rows[1]["prompt"]]
    assert [s.messages for s in plain if s.messages] == [rows[2]["messages"]]
    fresh = make_workload(spec, None).requests(3, 0)
    (text,) = (s.prompt_text for s in fresh if s.prompt_text)
    (messages,) = (s.messages for s in fresh if s.messages)
    (ids,) = (s.prompt_ids for s in fresh if s.prompt_ids)
    salt, _, rest = text.partition(" ")
    assert (salt[0], salt[-1], rest) == ("[", "]", "tell me")
    assert messages[0]["content"] == f"{salt} be brief"
    assert messages[1] == rows[2]["messages"][1]
    assert len(ids) == 6


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file or folder"),
        ("", "contains no usable rows"),
        ("{", "neither JSON nor JSONL"),
        ("[1]", "is not an object"),
        ("{}", "row 1: must have either prompt or messages"),
        ('{"prompt": "a", "messages": []}', "row 1: must have either"),
        ('{"prompt": "a"}\n{"prompt": 5}', "row 2: prompt must be a non-empty text"),
        ('{"prompt": "a", "output_tokens": -1}', "row 1: output_tokens"),
    ],
)
def test_a_bad_jsonl_file_is_named(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BenchError, match=f"{words}.*--dataset"):
        make_workload({"kind": "jsonl", "dataset": str(path)}, None)


def test_a_tokenizer_at_hand(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}
    content = {"version": "1.0", "added_tokens": [], "model": model, "pre_tokenizer": {"type": "Whitespace"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = local_tokenizer(str(tmp_path))
    assert tokenizer_size(tokenizer) == 3
    assert local_encoder(tokenizer)(["a b", "c"]) == [[0, 1], [2]]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BenchError, match="--tokenizer"):
        local_tokenizer(str(tmp_path))
