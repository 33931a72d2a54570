"""Pictures in chats: the layouts of the public data sets, on tiny files, and what is sent of them."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import datasets
from bench.errors import BenchError
from bench.workloads import has_exact_lengths, make_workload
from bench.workloads.base import RequestSpec
from bench.workloads.pictures import marked
from engine.data import datasets_folder

COLORS = ["red", "green", "blue", "white", "black", "yellow"]


def picture(number: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 48), COLORS[number % len(COLORS)]).save(out, kind)
    return out.getvalue()


def said(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def layout(name: str, number: int) -> dict[str, Any]:
    """A row as the data set stores it."""
    question, answer = f"question {number}?", {"role": "assistant", "content": "answer"}
    images = [{"bytes": picture(number), "path": None}]
    if name == "chat":
        return {"images": images, "conversation_id": str(number), "conversation": [[said(question), answer]]}
    if name == "chat, flat":
        return {"images": images, "conversation": [said(question), answer]}
    if name == "chat, pairs":
        return {"images": images, "conversation": [{"user": question, "assistant": "answer"}]}
    return {"images": images, "turns": [[said(question)]], "question_id": str(number)}


def save(rows: list[dict[str, Any]], folder: Path, how: str) -> Path:
    features = dict(datasets.Dataset.from_list(rows).features)
    for column in features.keys() & {"images", "image"}:
        features[column] = datasets.List(datasets.Image()) if column == "images" else datasets.Image()
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    if how == "disk":
        made.save_to_disk(str(folder / "disk"))
        return folder / "disk"
    inside = folder / "data"
    inside.mkdir()
    made.to_parquet(str(inside / "train-00000-of-00001.parquet"))
    return folder if how == "folder" else inside / "train-00000-of-00001.parquet"


def parts(spec: RequestSpec) -> list[dict[str, Any]]:
    assert spec.messages is not None
    assert [m["role"] for m in spec.messages] == ["user"]
    return spec.messages[0]["content"]


def sent_picture(spec: RequestSpec) -> str:
    return next(part["image_url"]["url"] for part in parts(spec) if part["type"] == "image_url")


@pytest.mark.parametrize(
    ("name", "how"),
    [("chat", "file"), ("chat", "folder"), ("chat", "disk"), ("bench", "file"), ("chat, flat", "file"),
     ("chat, pairs", "file")],
)  # fmt: skip
def test_layouts_of_visionarena(name: str, how: str, tmp_path: Path) -> None:
    path = save([layout(name, i) for i in range(5)], tmp_path, how)
    workload = make_workload({"kind": "visionarena", "dataset": str(path), "output": 8, "fresh": False}, None)
    specs = workload.requests(5, 3)
    by_question = {parts(spec)[-1]["text"]: spec for spec in specs}
    assert set(by_question) == {f"question {i}?" for i in range(5)}
    for i in range(5):
        url = sent_picture(by_question[f"question {i}?"])
        assert url == "data:image/png;base64," + base64.b64encode(picture(i)).decode()
    assert {spec.output_tokens for spec in specs} == {8}
    assert not has_exact_lengths(workload)
    assert make_workload(workload.describe(), None).requests(5, 3) == specs


def test_fresh_requests_have_a_salt_before_a_picture_of_their_own(tmp_path: Path) -> None:
    path = save([layout("chat", 0)], tmp_path, "file")
    workload = make_workload({"kind": "visionarena", "dataset": str(path)}, None)
    first, second = workload.requests(2, 1)
    (other,) = workload.requests(1, 2)
    assert workload.requests(2, 1) == [first, second]
    assert len({sent_picture(spec) for spec in (first, second, other)}) == 3
    assert len({parts(spec)[0]["text"] for spec in (first, second, other)}) == 3
    assert [part["type"] for part in parts(first)] == ["text", "image_url", "text"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_mark_changes_pixels_in_the_corner_only(kind: str) -> None:
    plain, one, same, two = (
        Image.open(io.BytesIO(content)).convert("RGB")
        for content in (
            picture(3, kind), *(marked(picture(3, kind), salt) for salt in "aab")
        )
    )  # fmt: skip
    assert one.size == plain.size
    assert one.tobytes() == same.tobytes()
    assert one.tobytes() != two.tobytes()
    assert one.getpixel((0, 0)) == plain.getpixel((0, 0))
    with pytest.raises(BenchError, match="--dataset"):
        marked(b"no picture", "a")


@pytest.mark.parametrize(("repeat", "distinct"), [(0, 40), (25, 30), (50, 20), (100, 1)])
def test_mmmu_pro_repeats_as_many_pictures_as_asked(repeat: int, distinct: int, tmp_path: Path) -> None:
    rows = [{"id": str(i), "image": {"bytes": picture(i), "path": None}, "options": "['A']"} for i in range(6)]
    spec = {"kind": "mmmu-pro", "dataset": str(save(rows, tmp_path, "file")), "repeat": repeat}
    workload = make_workload(spec, None)
    urls = [sent_picture(r) for r in workload.requests(40, 5)]
    assert len(set(urls)) == pytest.approx(distinct, abs=1)
    assert not set(urls) & {sent_picture(r) for r in workload.requests(40, 6)}
    assert workload.name.endswith(f"repeat {repeat}%")
    assert workload.requests(60, 5)[:40] == workload.requests(40, 5)


def test_the_sample_that_ships() -> None:
    folder = datasets_folder() / "vision-sample"
    licences = (folder / "LICENSES.md").read_text()
    pictures = sorted(folder.glob("*.jpg"))
    assert len(pictures) == 12
    for path in pictures:
        assert f"`{path.name}`" in licences
        assert path.stat().st_size <= 60_000
    rows = [json.loads(line) for line in (folder / "sample.jsonl").read_text().splitlines()]
    assert {name for row in rows for name in row["images"]} == {path.name for path in pictures}
    workload = make_workload({"kind": "visionarena", "dataset": "vision-sample", "output": 16}, None)
    assert workload.name == "visionarena vision-sample/16"
    assert len(workload.requests(20, 0)) == 20


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "pass --dataset"),
        ({"dataset": "no/such/folder/anywhere"}, "no file or folder .*--dataset"),
        ({"dataset": "."}, "contains no .parquet, .jsonl or .json file .*--dataset"),
        ({"dataset": "other.jsonl"}, "has no rows in the format of .* it has text .*--dataset"),
        ({"dataset": "broken.parquet"}, "cannot be read: .*--dataset"),
        ({"dataset": "gone.jsonl"}, "image .* cannot be read: .*--dataset"),
        ({"dataset": "vision-sample", "repeat": 101}, "repeat"),
    ],
)
def test_bad_data_is_one_clear_line(
    fields: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if fields.get("dataset", "").endswith((".jsonl", ".parquet")):
        (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
        (tmp_path / "gone.jsonl").write_text(json.dumps({"images": ["gone.jpg"], "turns": [[said("?")]]}) + "\n")
        if "broken" in fields["dataset"]:
            (tmp_path / "broken.parquet").write_text("x")
    kind = "mmmu-pro" if "repeat" in fields else "visionarena"
    with pytest.raises(BenchError, match=words) as raised:
        make_workload({"kind": kind, **fields}, None).requests(1, 0)
    assert "\n" not in str(raised.value)
