"""Chats about images: VisionArena's data sets, and MMMU-Pro, whose questions are in the images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.workloads.base import RequestSpec
from bench.workloads.chats import text_of
from bench.workloads.datafile import RowFaults
from bench.workloads.dataset import DEFAULT_OUTPUT, DEFAULT_ROWS, FLAG, find_data, read_rows
from bench.workloads.fields import Length, boolean, draw, integer, length, length_field, length_text, repeat_share
from bench.workloads.images import repeats
from bench.workloads.pictures import data_url, marked, picture_bytes
from bench.workloads.sampling import passes, salt_text

# The number of tokens of an image depends on the server; these two only size a server started for the run.
_PICTURE_TOKENS = 1500
_TEXT_TOKENS = 1500
_MMMU_QUESTION = (
    "The picture shows a question with its possible answers. Work it out step by step, then name the letter of the "
    "right answer on a line of its own."
)


class _Pictures:
    """Base of the two kinds: data set, output lengths, and the form of messages."""

    kind = ""
    subset: str | None = None
    split = "train"

    def __init__(
        self,
        *,
        dataset: str | None = None,
        output: Length = DEFAULT_OUTPUT,
        rows: int = DEFAULT_ROWS,
        fresh: bool = True,
        subset: str | None = None,
        split: str | None = None,
        skip_bad_rows: bool = False,
    ):
        self._dataset = dataset
        self._faults = RowFaults(str(dataset), FLAG, boolean("skip_bad_rows", skip_bad_rows))
        self._source = find_data(dataset, self.kind)
        self._output = length("output", output)
        self._limit = integer("rows", rows)
        self._fresh = boolean("fresh", fresh)
        self.subset = subset or self.subset
        self.split = split or self.split
        self._rows: list[tuple[str, list[Any]]] | None = None

    @property
    def name(self) -> str:
        stem = Path(str(self._dataset)).stem
        return f"{self.kind if stem == self.kind else f'{self.kind} {stem}'}/{length_text(self._output)}"

    @property
    def max_tokens(self) -> int:
        return _TEXT_TOKENS + _PICTURE_TOKENS + self._output[1]

    def notes(self) -> list[str]:
        return [self._faults.note()] if self._faults.found else []

    def describe(self) -> dict[str, Any]:
        known: dict[str, Any] = {"kind": self.kind, "dataset": self._dataset, "output": length_field(self._output)}
        known |= {"rows": self._limit, "fresh": self._fresh, "split": self.split}
        known |= {"skip_bad_rows": True} if self._faults.skip else {}
        return known | ({"subset": self.subset} if self.subset else {})

    def rows(self) -> list[tuple[str, list[Any]]]:
        """The rows as (question, images as stored)."""
        if self._rows is None:
            found = read_rows(self._source, self._limit, self._faults, subset=self.subset, split=self.split)
            self._rows = [row for row in map(self.read, found) if row is not None]
            if not self._rows:
                columns = ", ".join(found[0]) if found else "no rows"
                raise BenchError(
                    f"the data set {self._dataset} has no rows in the format of {self.kind}; it has {columns} "
                    "(--dataset)"
                )
        return self._rows

    def read(self, row: dict[str, Any]) -> tuple[str, list[Any]] | None:
        raise NotImplementedError

    def _spec(self, question: str, pictures: list[bytes], salt: str, output: int) -> RequestSpec:
        content: list[dict[str, Any]] = []
        # The salt comes before the images, since prefix caches match from the beginning.
        if self._fresh:
            content.append({"type": "text", "text": salt_text("", salt).strip()})
        for picture in pictures:
            url = data_url(marked(picture, salt) if self._fresh else picture)
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": question})
        return RequestSpec(
            input_tokens=len(question) // 4 + _PICTURE_TOKENS * len(pictures),
            output_tokens=output,
            messages=[{"role": "user", "content": content}],
        )


class VisionArena(_Pictures):
    """The first question of each conversation with its images: VisionArena-Chat and vision-arena-bench-v0.1."""

    kind = "visionarena"

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng([seed, 1])
        rows, order = self.rows(), passes(len(self.rows()), seed)
        specs = []
        for _ in range(count):
            row, salt = next(order)
            question, pictures = rows[row]
            read = [picture_bytes(picture) for picture in pictures]
            specs.append(self._spec(question, read, salt, draw(rng, self._output)))
        return specs

    def read(self, row: dict[str, Any]) -> tuple[str, list[Any]] | None:
        turns = row.get("conversation") or row.get("turns")
        question = next(_user_texts(turns), "") if turns is not None else ""
        pictures = row.get("images") or ([row["image"]] if row.get("image") is not None else [])
        return (question, list(pictures)) if question and pictures else None


class MMMUPro(_Pictures):
    """Images that contain their question (MMMU-Pro's "vision" subset); `repeat` % of requests repeat an earlier one."""

    kind = "mmmu-pro"
    subset = "vision"
    split = "test"

    def __init__(self, *, repeat: int = 0, **fields: Any):
        super().__init__(**fields)
        self._repeat = repeat_share(repeat)

    @property
    def name(self) -> str:
        return f"{super().name} repeat {self._repeat}%"

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"repeat": self._repeat}

    def requests(self, count: int, seed: int) -> list[RequestSpec]:
        rng = np.random.default_rng([seed, 1])
        rows, order = self.rows(), passes(len(self.rows()), seed)
        specs: list[RequestSpec] = []
        first_uses: list[int] = []
        for i in range(count):
            output = draw(rng, self._output)
            if repeats(i, self._repeat, first=not first_uses):
                earlier = specs[first_uses[int(rng.integers(len(first_uses)))]]
                specs.append(RequestSpec(earlier.input_tokens, output, messages=earlier.messages))
                continue
            first_uses.append(i)
            row, salt = next(order)
            question, pictures = rows[row]
            specs.append(self._spec(question, [picture_bytes(picture) for picture in pictures], salt, output))
        return specs

    def read(self, row: dict[str, Any]) -> tuple[str, list[Any]] | None:
        picture = row.get("image")
        return (_MMMU_QUESTION, [picture]) if picture is not None else None


def _user_texts(turns: Any) -> Iterator[str]:
    """The user's texts of a conversation: messages with roles, lists of messages, or {"user": …, "assistant": …}."""
    if isinstance(turns, str):
        yield turns
    elif isinstance(turns, list):
        for turn in turns:
            yield from _user_texts(turn)
    elif isinstance(turns, dict):
        if "content" in turns:
            text = text_of(turns["content"])
            if turns.get("role", "user") == "user" and text:
                yield text
        elif isinstance(turns.get("user"), str):
            yield turns["user"]
