"""Result files: one record per request, one per load point, one summary per run.

results/NAME/
    summary.json                 versions, hardware, seed, configurations, one answer per (configuration, workload)
    points.csv                   one PointRecord per load point
    generators.csv               one GeneratorRecord per load point and generator on another host, if there are any
    requests/POINT_ID.parquet    one RequestRecord per request
    metrics/POINT_ID.parquet     one ServerState per reading of the server's metrics, if it has any
"""

import csv
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pandas as pd

from bench.results.records import Answer, GeneratorRecord, PointRecord, RequestRecord, ServerState, Summary
from bench.results.writing import CannotWriteError, replace_file, writing

POINTS_FILE = "points.csv"
GENERATORS_FILE = "generators.csv"
SUMMARY_FILE = "summary.json"
REQUESTS_FOLDER = "requests"
METRICS_FOLDER = "metrics"
FLAG = "--out"

Record = TypeVar("Record")


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", name).strip("-") or "x"


class RunFiles:
    """Writes and reads the files of one run; files are always complete."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.keeps_requests = True  # whether a file of each load point's requests and readings is written
        self.unwritten = ""  # why a load point could not be written
        self.added: set[str] = set()  # ids of the load points of this run
        self._kept: dict[str, tuple[PointRecord, list[RequestRecord]]] = {}  # load points that could not be written

    def write_summary(self, summary: Summary) -> None:
        """Raises CannotWriteError."""
        summary.simulated = any("simulated" in one for one in summary.configurations.values())
        text = json.dumps(dataclasses.asdict(summary), indent=2, ensure_ascii=False) + "\n"
        with writing(self.folder / SUMMARY_FILE, FLAG):
            replace_file(self.folder / SUMMARY_FILE, lambda part: part.write_text(text, encoding="utf-8"))

    def read_summary(self) -> Summary:
        data = json.loads((self.folder / SUMMARY_FILE).read_text(encoding="utf-8-sig"))
        data["answers"] = [Answer(**answer) for answer in data["answers"]]
        return Summary(**data)

    def add_point(
        self,
        point: PointRecord,
        requests: list[RequestRecord],
        readings: Sequence[ServerState] = (),
        generators: Sequence[GeneratorRecord] = (),
    ) -> None:
        """Write the requests first, then the load point, so that a point in points.csv always has its requests.

        `at_s` of the readings is relative to the start of the load point. Raises CannotWriteError; the load point and
        its requests are then kept in memory, where they can still be read.
        """
        self.added.add(point.point_id)
        try:
            with writing(self.folder, FLAG):
                if self.keeps_requests:
                    self._write_records(REQUESTS_FOLDER, point.point_id, RequestRecord, requests)
                if readings and self.keeps_requests:
                    self._write_records(METRICS_FOLDER, point.point_id, ServerState, readings)
                else:
                    (self.folder / METRICS_FOLDER / f"{point.point_id}.parquet").unlink(missing_ok=True)
                self._write_generators(point.point_id, generators)
                others = [
                    p for p in self.read_points() if p.point_id not in self._kept and p.point_id != point.point_id
                ]
                self.write_points([*others, point])
        except CannotWriteError as error:
            self.unwritten = str(error)
            self._kept[point.point_id] = point, requests
            raise

    def _write_records(self, folder: str, point_id: str, kind: type, records: Sequence[Any]) -> None:
        frame = _frame(kind, records)
        if kind is ServerState:
            frame = frame.astype(float)  # a missing metric is a column of NaN, not one without a type
        replace_file(self.folder / folder / f"{point_id}.parquet", frame.to_parquet)

    def _write_generators(self, point_id: str, generators: Sequence[GeneratorRecord]) -> None:
        known = self.read_generators()
        others = [one for one in known if one.point_id != point_id]
        if generators or len(others) < len(known):
            self._write_table(GENERATORS_FILE, GeneratorRecord, [*others, *generators])

    def write_points(self, points: list[PointRecord]) -> None:
        self._write_table(POINTS_FILE, PointRecord, points)

    def _write_table(self, file: str, kind: type, records: Sequence[Any]) -> None:
        names = [f.name for f in dataclasses.fields(kind)]

        def write(part: Path) -> None:
            with part.open("w", newline="", encoding="utf-8") as f:
                writer = csv.writer(f)
                writer.writerow(names)
                for record in records:
                    writer.writerow([_cell(getattr(record, name)) for name in names])

        with writing(self.folder / file, FLAG):
            replace_file(self.folder / file, write)

    def read_points(self) -> list[PointRecord]:
        """The load points of points.csv, and those that could not be written to it."""
        kept = [point for point, _ in self._kept.values()]
        records = self._read_table(POINTS_FILE, PointRecord)
        return [*(record for record in records if record.point_id not in self._kept), *kept]

    def read_generators(self) -> list[GeneratorRecord]:
        """The parts of generators on other hosts in the load points of generators.csv."""
        return self._read_table(GENERATORS_FILE, GeneratorRecord)

    def _read_table(self, file: str, kind: type[Record]) -> list[Record]:
        path = self.folder / file
        if not path.exists():
            return []
        kinds = get_type_hints(kind)
        with path.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets add a byte order mark
            return [kind(**{k: _value(v, kinds[k]) for k, v in row.items()}) for row in csv.DictReader(f)]

    def requests_path(self, point_id: str) -> Path:
        return self.folder / REQUESTS_FOLDER / f"{point_id}.parquet"

    def read_requests(self, point_id: str) -> pd.DataFrame:
        """The requests of a load point; columns that the file of an older version lacks have their defaults."""
        if point_id in self._kept:
            return _frame(RequestRecord, self._kept[point_id][1])
        frame = pd.read_parquet(self.requests_path(point_id))
        for column in dataclasses.fields(RequestRecord):
            if column.default is not dataclasses.MISSING and column.name not in frame:
                frame[column.name] = column.default
        return frame

    def read_metrics(self, point_id: str) -> pd.DataFrame | None:
        """The readings of the server's metrics during a load point, columns of ServerState; None if there are none."""
        path = self.folder / METRICS_FOLDER / f"{point_id}.parquet"
        return pd.read_parquet(path) if path.exists() else None


def _frame(kind: type, records: Sequence[Any]) -> pd.DataFrame:
    names = [f.name for f in dataclasses.fields(kind)]
    return pd.DataFrame({name: [getattr(record, name) for record in records] for name in names}, columns=names)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: Any) -> Any:
    options = getattr(kind, "__args__", (kind,))
    if text == "" and type(None) in options:
        return None
    if bool in options:
        return text == "true"
    if int in options:
        return int(text)
    if float in options:
        return float(text)
    return text
