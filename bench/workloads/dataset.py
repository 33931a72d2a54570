"""Rows of a data set as plain dictionaries: from a JSON, JSONL or parquet file, a folder, or the hub.

Images are returned as they are stored: {"bytes": …, "path": …}, or a path, made absolute.
"""

import importlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.errors import BenchError
from bench.workloads.datafile import DataRow, RowFaults, read_json
from engine.data import datasets_folder
from engine.text import first_line

DEFAULT_ROWS = 1000
DEFAULT_OUTPUT = 128  # tokens
FLAG = "--dataset"
_PACKED = (".gz", ".bz2", ".xz")
_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".yaml", ".yml", ".zip")
_SHIPPED = ("vision-sample",)


def find_data(dataset: Any, kind: str) -> Path | str:
    """The file or folder that `dataset` names, or the hub id itself; raises BenchError that names the flag."""
    if dataset is None:
        raise BenchError(f"workload {kind} needs a data set: pass --dataset (field dataset)")
    if not isinstance(dataset, str) or not dataset:
        raise BenchError(f"workload {kind}: dataset must be a path or a hub id, not {dataset!r} (--dataset)")
    path = Path(dataset).expanduser()
    if path.exists():
        return path
    if dataset in _SHIPPED:
        return datasets_folder() / dataset
    if _is_hub_id(dataset):
        return dataset
    raise BenchError(f"workload {kind}: there is no file or folder {dataset} (--dataset)")


def read_rows(
    source: Path | str, limit: int, faults: RowFaults, *, subset: str | None = None, split: str = "train"
) -> list[dict]:
    """The first `limit` rows; `subset` and `split` are the hub's. Raises BenchError naming --dataset."""
    try:
        if isinstance(source, str):
            return list(itertools.islice(_from_hub(source, subset, split), limit))
        if source.is_file() and source.suffix != ".parquet":
            return [row.fields for row in read_json_rows(source, limit, faults)]
        return list(itertools.islice(_from_path(source, split, limit, faults), limit))
    except BenchError:
        raise
    except Exception as error:  # the library and the hub's client raise many kinds
        failed = "is not a local path and cannot be read from the hub" if isinstance(source, str) else "cannot be read"
        raise BenchError(f"the data set {source} {failed}: {first_line(error)} (--dataset)") from None


def read_json_rows(path: Path, limit: int | None, faults: RowFaults) -> list[DataRow]:
    """The first `limit` good rows of a JSON list or a JSONL file; relative paths of images become absolute."""
    rows: list[DataRow] = []
    for row in read_json(path, FLAG):
        if row.fault:
            faults.add(row.where, row.fault)
        else:
            rows.append(DataRow(row.where, _absolute(row.fields, path.parent)))
        if len(rows) == limit:
            break
    faults.check()
    return rows


def _absolute(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    for key in ("images", "image"):
        named = row.get(key)
        if isinstance(named, str):
            row[key] = str(folder / named)
        elif isinstance(named, list):
            row[key] = [str(folder / name) if isinstance(name, str) else name for name in named]
    return row


def _from_path(path: Path, split: str, limit: int, faults: RowFaults) -> Iterable[dict]:
    datasets = _library()

    if path.is_file():
        return _plain(datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True))
    if (path / "state.json").exists():
        return _plain(datasets.load_from_disk(str(path)))
    if (path / "dataset_dict.json").exists():
        return _plain(datasets.load_from_disk(str(path / split)))
    parquet = sorted(str(file) for file in path.rglob("*.parquet"))
    if parquet:
        of_split = [file for file in parquet if Path(file).name.startswith(split)]
        return _plain(datasets.load_dataset("parquet", data_files=of_split or parquet, split="train", streaming=True))
    endings = [f".{kind}{packed}" for kind in ("jsonl", "json") for packed in ("", *_PACKED)]
    files = sorted(file for ending in endings for file in path.glob(f"*{ending}"))
    if not files:
        raise BenchError(f"{path} contains no .parquet, .jsonl or .json file (--dataset)")
    return (row.fields for file in files for row in read_json_rows(file, limit, faults))


def _from_hub(name: str, subset: str | None, split: str) -> Iterable[dict]:
    datasets = _library()

    # Streaming only fetches the rows that are used; data sets may have hundreds of gigabytes.
    return _plain(datasets.load_dataset(name, subset, split=split, streaming=True))


def _plain(data: Any) -> Iterable[dict]:
    """The data without decoding images, which are sent as they are stored."""
    datasets = _library()

    if data.features is None:
        return data
    features = {name: _undecoded(feature) for name, feature in data.features.items()}
    return data.cast(datasets.Features(features)) if features != dict(data.features) else data


def _undecoded(feature: Any) -> Any:
    datasets = _library()

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_undecoded(inner) for inner in feature]
    if hasattr(feature, "feature"):
        return type(feature)(_undecoded(feature.feature))
    return feature


def _library() -> Any:
    """The `datasets` library, imported only if needed; by name, since a folder of this project has the same name."""
    return importlib.import_module("datasets")


def _is_hub_id(name: str) -> bool:
    owner, slash, rest = name.partition("/")
    looks = bool(owner and slash and rest) and "/" not in rest and owner[0].isalnum()
    return looks and Path(rest).suffix not in (*_PACKED, *_FILES)
