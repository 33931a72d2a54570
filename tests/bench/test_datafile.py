"""Data files as people have them: encodings, line ends, compression, and rows that can't be read."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.datafile import read_json, read_table
from bench.errors import BenchError
from bench.presets import read_yaml
from bench.workloads import make_workload
from tests.bench.workloads.conftest import sentence

ROWS = [{"prompt": "one\u2028two\u2029three\x85four"}, {"prompt": "caf\u00e9 \U0001f600", "n": None}]
TEXT = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)

FORMS: dict[str, Callable[[str], bytes]] = {
    "plain": lambda text: text.encode(),
    "mark": lambda text: text.encode("utf-8-sig"),
    "windows": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "old Mac": lambda text: text.replace("\n", "\r").encode(),
    "blank lines": lambda text: ("\n \n" + text.replace("\n", "\n\n\n")).encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "UTF-16, big": lambda text: "\ufeff".encode("utf-16-be") + text.encode("utf-16-be"),
    "UTF-16 without a mark": lambda text: text.encode("utf-16-le"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "gzip": lambda text: gzip.compress(text.encode("utf-8-sig")),
    "bzip2": lambda text: bz2.compress(text.encode()),
    "xz": lambda text: lzma.compress(text.encode("utf-16")),
}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_in_every_form(form: str, tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", FORMS[form](TEXT))
    assert [row.fields for row in read_json(lines, "--dataset")] == ROWS
    whole = write(tmp_path / "a.json", FORMS[form](json.dumps(ROWS, ensure_ascii=False, indent=1) + "\n"))
    assert [row.fields for row in read_json(whole, "--dataset")] == ROWS
    table = write(tmp_path / "a.csv", FORMS[form]('time,text\n1,"a ""b"", c"\n , \n2.5,d\n'))
    assert [row.fields for row in read_table(table, "--trace")] == [
        {"time": "1", "text": 'a "b", c'},
        {"time": "2.5", "text": "d"},
    ]
    sweep = write(tmp_path / "a.yaml", FORMS[form]("kind: random\ninput: 5\n"))
    assert read_yaml(sweep) == {"kind": "random", "input": 5}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_separators(separator: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", f"time{separator}text{separator}\n1{separator}x{separator}\n")
    assert [row.fields for row in read_table(path, "--trace")] == [{"time": "1", "text": "x"}]


def test_a_cell_may_hold_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'time,text\n1,"two\nlines"\n2\n')
    first, second = read_table(path, "--trace")
    assert first.fields == {"time": "1", "text": "two\nlines"}
    assert (second.where, second.fault) == ("row 2 (line 4)", "has 1 fields where the header names 2")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n', "row 2 holds half of a surrogate pair"),
        (b'[{"prompt": "a"}, {"prompt": ["\\udc00"]}]', "row 2 holds half of a surrogate pair"),
        (b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n', "row 2 holds bytes that are not UTF-8"),
        (b'{"prompt": "a"}\n\nnull\n', r"row 2 \(line 3\) can't be used: rows must be objects"),
        (b'{"prompt": "a"}\n{"prompt": "b"} x\n', "row 2 is neither JSON nor JSONL: Extra data"),
        (b'{"prompt": "a"}\n' + b"[" * 100_000 + b"\n", "row 2 is (nested too deeply|neither JSON)"),
        (b'{"prompt": "a"}\n{"n": ' + b"9" * 5000 + b"}\n", "row 2 is neither JSON nor JSONL"),
        (b'{"prompt": "a"}\n{"prompt": NaN}\n', "row 2: give either prompt or messages"),
        (b'{"prompt": "a"}\n{"prompt": "b", "output_tokens": Infinity}\n', "row 2: output_tokens"),
        (b'{"prompt": "a"}\n{"prompt": "b", "output_tokens": 1.5}\n', "row 2: output_tokens"),
        (b'{"prompt": "a"}\n{"prompt": ["b", "c"]}\n', "row 2: prompt holds 2 texts"),
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "row 2: prompt must be .*not be empty"),
        (b'{"prompt": "a"}\n{"messages": [{"role": "user", "content": [5]}]}\n', "row 2: the content of message 1"),
        (b'{"prompt": "a"}\n{"messages": ["hi"]}\n', "row 2: message 1 must be an object with a role"),
    ],
)
def test_bad_rows_are_named_and_can_be_left_out(content: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", content)
    spec = {"kind": "jsonl", "dataset": str(path), "fresh": False}
    with pytest.raises(BenchError, match=f"{words}.*--skip-bad-rows.*--dataset"):
        make_workload(spec, None)
    workload = make_workload(spec | {"skip_bad_rows": True}, None)
    assert {request.prompt_text for request in workload.requests(5, 0)} == {"a"}
    (note,) = workload.notes()
    assert note.startswith(f"{path}: left out 1 bad row: row 2")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(TEXT.encode(), mtime=0)[:-12], "compressed data is damaged"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (b"PAR1....", "a parquet file"),
        (b"\x28\xb5\x2f\xfd....", "compressed with zstd"),
        (b'[{"prompt": "a"}', "neither JSON nor JSONL"),
    ],
)
def test_files_that_are_something_else(content: bytes, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", content)
    with pytest.raises(BenchError, match=f"{words}.*--dataset"):
        list(read_json(path, "--dataset"))


def test_an_unfinished_quote_is_no_long_cell(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'timestamp,note\n1,"a\n2,b\n3,c\n')
    with pytest.raises(BenchError, match="neither CSV nor JSONL: unexpected end of data"):
        read_table(path, "--trace")


def test_contents_that_are_lists_of_strings(tmp_path: Path) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": ["look", "here", picture]}]},
        {"messages": [{"role": "user", "content": {"type": "text", "text": "alone"}}]},
        {"prompt": ["one text"], "output_tokens": 3.0},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": []}], "output_tokens": None},
    ]
    path = write(tmp_path / "p.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    spec = {"kind": "jsonl", "dataset": str(path), "output": 7, "fresh": False}
    requests = make_workload(spec, None).requests(4, 0)
    contents = [r.messages[0]["content"] for r in requests if r.messages]
    texts = [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]
    assert [*texts, picture] in contents
    assert [{"type": "text", "text": "alone"}] in contents
    assert None in contents
    assert [(r.prompt_text, r.output_tokens) for r in requests if r.prompt_text] == [("one text", 3)]
    assert sorted(r.output_tokens for r in requests) == [3, 7, 7, 7]


def test_sharegpt_says_which_rows_it_doesnt_use(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": sentence(0, 5)}, {"type": "text", "text": sentence(1, 5)}]
    rows: list[Any] = [
        {"conversations": [{"from": "human", "value": sentence(2, 9)}, {"from": "gpt", "value": ["a b", "c d"]}]},
        {"conversations": [{"role": "user", "content": parts}, {"role": "assistant", "content": "e f g h i"}]},
        {"conversations": []},
        {"conversations": [{"from": "human", "value": "short"}, {"from": "gpt", "value": "a b c d"}]},
    ]
    path = write(tmp_path / "s.json", json.dumps(rows).encode("utf-8-sig"))

    def encode(texts: list[str]) -> list[list[int]]:
        return [[len(word) for word in text.split()] for text in texts]

    workload = make_workload({"kind": "sharegpt", "dataset": str(path)}, None, encode)
    assert workload.notes() == []
    requests = workload.requests(2, 0)
    assert sorted((r.input_tokens, r.output_tokens) for r in requests) == [(9, 4), (10, 5)]
    (note,) = workload.notes()
    assert "2 of 4 rows are used: 1 don't begin with a question and an answer, 1 are shorter" in note


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: 1\na: 2\n", "'a' stands twice"), ("day: 2026-13-45\n", "not valid YAML: month"), ("a: [", "not valid YAML")],
)
def test_a_yaml_file_that_isnt_right(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=words):
        read_yaml(write(tmp_path / "a.yaml", text))


def test_a_folder_of_compressed_files(tmp_path: Path) -> None:
    conversation = {"conversation": [{"role": "user", "content": "what is it?"}], "images": ["a.png"]}
    write(tmp_path / "a.jsonl.gz", gzip.compress(json.dumps(conversation).encode()))
    workload = make_workload({"kind": "visionarena", "dataset": str(tmp_path)}, None)
    assert workload.rows() == [("what is it?", [str(tmp_path / "a.png")])]  # type: ignore[attr-defined]
    with pytest.raises(BenchError, match=r"there is no file or folder data/none.jsonl.gz"):
        make_workload({"kind": "sharegpt", "dataset": "data/none.jsonl.gz"}, None)
