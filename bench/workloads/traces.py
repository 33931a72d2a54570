"""Recorded arrivals: public traces in their published formats, and CSV or JSONL files with known column names.

Mooncake: JSONL with timestamp in milliseconds, input_length, output_length, and hash_ids with one id per block of 512
tokens; prompts share a block and all blocks before it if they have the same id. Bailian (Qwen): the same with seconds
and blocks of 16 tokens. BurstGPT: CSV with Timestamp in seconds, Request tokens, Response tokens. Azure LLM inference:
CSV with TIMESTAMP as date-times, ContextTokens, GeneratedTokens.
"""

import functools
import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from bench.errors import BenchError
from bench.workloads.datafile import DataRow, RowFaults, read_table
from bench.workloads.fields import MOST_TOKENS

UNITS = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}  # per second
FLAG = "--trace"
MOONCAKE_BLOCK = 512  # tokens per hash id


# Column names are compared in lower case without spaces and punctuation; those of times may end in a unit.
def _words(text: str) -> list[str]:
    return text.split()


_TIMES = _words(
    "timestamp arrival arrivaltime arrivaltimestamp arrivedat time requesttime starttime createdtime createdat "
    "datetime date ts"
)
_INPUTS = _words(
    "inputtokens inputlength prompttokens input contexttokens requesttokens numprefilltokens prefilltokens "
    "promptlength promptlen inputlen isl inputtokenlength inputtokencount numinputtokens numprompttokens contextlength"
)
_OUTPUTS = _words(
    "outputtokens outputlength completiontokens output generatedtokens responsetokens numdecodetokens decodetokens "
    "outputlen completionlength osl outputtokenlength outputtokencount numoutputtokens responselength"
)
_SUFFIXES = {
    "s": "s", "sec": "s", "secs": "s", "second": "s", "seconds": "s",
    "ms": "ms", "msec": "ms", "millis": "ms", "milliseconds": "ms",
    "us": "us", "usec": "us", "micros": "us", "microseconds": "us",
    "ns": "ns", "nanos": "ns", "nanoseconds": "ns",
}  # fmt: skip
_EPOCHS = ((1e17, "ns"), (1e14, "us"), (1e11, "ms"), (5e8, "s"))  # larger numbers are dates after 1973
_UNCLEAR_GAP_S, _MOONCAKE_GAP_S = 100.0, 10.0  # larger mean gaps make seconds improbable
_BURSTGPT = frozenset({"requesttokens", "responsetokens"})
_AZURE = frozenset({"contexttokens", "generatedtokens"})
_BAILIAN = frozenset({"chatid", "parentchatid"})
_BLOCKS = (512, 16, 32, 64, 128, 256, 1024, 2048, 4096)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_SECOND = re.compile(r"(?P<whole>.*\d{2}:\d{2}:\d{2})[.,](?P<fraction>\d+)(?P<zone>.*)")


@dataclass(frozen=True, slots=True)
class Trace:
    """Recorded requests, sorted by time, with token counts if the file has them."""

    stem: str
    times: np.ndarray  # float64[count], seconds since the first request; count >= 2
    inputs: list[int] | None
    outputs: list[int] | None
    kind: str = ""  # "Mooncake", "BurstGPT", …; "" for other files
    unit: str = "s"  # of the file's times, or "date-times"
    hash_ids: list[tuple[Any, ...]] | None = None  # one id per block of the prompt
    block_tokens: int = MOONCAKE_BLOCK
    unused: tuple[str, ...] = ()  # unknown columns
    skipped: str = ""  # message about skipped rows

    @property
    def rate(self) -> float:
        """The mean rate in requests/s, from the first arrival to the last."""
        return (len(self.times) - 1) / float(self.times[-1])

    def summary(self) -> str:
        """What was recognized, as one line."""
        parts = [f"{len(self.times)} requests over {self.times[-1]:.4g} s ({self.rate:.3g} req/s)"]
        parts.append("date-times" if self.unit == "date-times" else f"times in {self.unit}")
        known = [name for name, found in (("input", self.inputs), ("output", self.outputs)) if found is not None]
        parts.append(f"{' and '.join(known)} lengths" if known else "no lengths")
        if self.hash_ids is not None:
            parts.append(f"shared prefixes in blocks of {self.block_tokens} tokens")
        if self.unused:
            parts.append(f"unused columns: {', '.join(self.unused)}")
        return f"trace {self.stem}{f' ({self.kind})' if self.kind else ''}: {'; '.join(parts)}"


@functools.lru_cache(maxsize=4)
def read_trace(path: str, unit: str = "auto", skip_bad_rows: bool = False) -> Trace:
    """Read a trace; `unit` is the unit of numeric times (UNITS) or "auto".

    Raises BenchError if the unit is ambiguous, and for bad rows unless they are to be skipped.
    """
    if not isinstance(path, str) or not path:
        raise BenchError(f"a trace must be the path of a file, not {path!r} ({FLAG})")
    if unit not in ("auto", *UNITS):
        raise BenchError(f"{unit!r} is not a valid time unit: choose from auto, {', '.join(UNITS)} (--trace-unit)")
    return _Reader(path, unit, skip_bad_rows).read()


@dataclass(frozen=True, slots=True)
class _Date:
    seconds: int
    fraction: float
    zoned: bool


@dataclass(slots=True)
class _Record:
    """One parsed row."""

    where: str
    moment: float | _Date
    inputs: int
    outputs: int
    ids: tuple[Any, ...]


class _Reader:
    """Reads one file as a Trace."""

    def __init__(self, path: str, given_unit: str, skip: bool):
        self._path = path
        self._given_unit = given_unit
        self._faults = RowFaults(path, FLAG, skip)
        self._rows = read_table(Path(path), FLAG)
        self._columns = list(dict.fromkeys(name for row in self._rows for name in row.fields))
        self._names = {_compact(name) for name in self._columns}
        self._time = _column(self._columns, _TIMES, units=True)
        self._input, self._output = _column(self._columns, _INPUTS), _column(self._columns, _OUTPUTS)
        self._ids = _column(self._columns, ["hashids"]) if self._input is not None else None

    def read(self) -> Trace:
        if self._time is None:
            for row in self._rows:
                if row.fault:
                    self._faults.add(row.where, row.fault)
            self._faults.check()
            its = f": its columns are {', '.join(self._columns)}" if self._columns else ""
            raise BenchError(f"{self._path} has no column timestamp{its} ({FLAG})")
        moments = [_moment(row.fields.get(self._time)) for row in self._rows]
        dates = 2 * sum(isinstance(m, _Date) for m in moments) > sum(m is not None for m in moments)
        records = [record for row in self._rows if (record := self._record(row, dates)) is not None]
        block = max(_BLOCKS, key=lambda size: sum(_fits(r, size) for r in records)) if self._ids else MOONCAKE_BLOCK
        records = [r for r in records if self._blocks_are_right(r, block)]
        self._faults.check()
        times, unit = self._dates(records) if dates else self._numbers(records)
        if len(times) < 2 or max(times) <= min(times):
            skipped = f" ({note})" if (note := self._faults.note()) else ""
            raise BenchError(f"{self._path}: a trace needs at least two requests at different times{skipped} ({FLAG})")
        order = np.argsort(times, kind="stable").tolist()
        used = {self._time, self._input, self._output, self._ids}
        return Trace(
            _stem(self._path),
            np.asarray(times, dtype=np.float64)[order] - min(times),
            [records[i].inputs for i in order] if self._input is not None else None,
            [records[i].outputs for i in order] if self._output is not None else None,
            kind=self._kind(unit),
            unit=unit,
            hash_ids=[records[i].ids for i in order] if self._ids is not None else None,
            block_tokens=block,
            unused=tuple(name or "(no name)" for name in self._columns if name not in used),
            skipped=self._faults.note(),
        )

    def _record(self, row: DataRow, dates: bool) -> _Record | None:
        """The row's values; None, with an entry in `_faults`, if one of them is bad."""
        fault = row.fault
        moment = None if fault else _moment(row.fields.get(self._time or ""))
        if not fault and (moment is None or isinstance(moment, _Date) != dates):
            what = "date-time" if dates else "number"
            fault = f"has no {what} in column {self._time}: {_shown(row.fields.get(self._time or ''))}"
        tokens = []
        for column in (self._input, self._output):
            value = row.fields.get(column or "")
            tokens.append(_whole(value) if column is not None else 1)
            if not fault and not 1 <= tokens[-1] <= MOST_TOKENS:
                fault = f"needs an integer of at least 1 in column {column}, not {_shown(value)}"
        ids = _listed(row.fields.get(self._ids or ""))
        if not fault and ids is not None and not _are_ids(ids):
            fault = f"has no list of ids in column {self._ids}: {_shown(ids)}"
        if fault or moment is None:
            self._faults.add(row.where, fault)
            return None
        return _Record(row.where, moment, tokens[0], tokens[1], tuple(ids or ()))

    def _blocks_are_right(self, record: _Record, block: int) -> bool:
        if not record.ids or _fits(record, block):
            return True
        blocks = math.ceil(record.inputs / block)
        expected = f"{record.inputs} tokens are {blocks} blocks of {block}"
        self._faults.add(record.where, f"has {len(record.ids)} ids in column {self._ids}, but its {expected}")
        return False

    def _dates(self, records: list[_Record]) -> tuple[list[float], str]:
        moments = [r.moment for r in records if isinstance(r.moment, _Date)]
        if self._given_unit != "auto":
            raise BenchError(f"{self._path}: --trace-unit does not apply: the trace has date-times (--trace-unit)")
        if len({moment.zoned for moment in moments}) > 1:
            raise BenchError(f"{self._path}: only some of the date-times have a time zone ({FLAG})")
        first = min((moment.seconds for moment in moments), default=0)
        return [moment.seconds - first + moment.fraction for moment in moments], "date-times"

    def _numbers(self, records: list[_Record]) -> tuple[list[float], str]:
        """Seconds since the first, and the unit of the file."""
        numbers = [r.moment for r in records if isinstance(r.moment, float)]
        unit = self._unit(numbers)
        first = min(numbers, default=0.0)
        # Division, since 0.001 is not exact in binary and 1500 ms should be 1.5 s.
        return [(number - first) / UNITS[unit] for number in numbers], unit

    def _unit(self, numbers: list[float]) -> str:
        if self._given_unit != "auto":
            return self._given_unit
        suffix, least = _suffix(self._time or ""), min(numbers, default=0.0)
        epoch = next((unit for start, unit in _EPOCHS if least >= start), None)
        if suffix is not None or epoch is not None:
            return str(suffix or epoch)
        if self._names >= _BURSTGPT or self._names & _BAILIAN:
            return "s"
        whole = all(number == int(number) for number in numbers)
        if self._ids is not None and whole:
            return "ms"
        span = max(numbers, default=0.0) - least
        gap = span / max(1, len(numbers) - 1)
        mooncake = whole and self._names >= {"timestamp", "inputlength", "outputlength"}
        if self._ids is None and gap <= (_MOONCAKE_GAP_S if mooncake else _UNCLEAR_GAP_S):
            return "s"
        rates = [f"in {unit} it has {UNITS[unit] / gap:.3g} req/s" for unit in ("s", "ms")] if gap else []
        raise BenchError(
            f"{self._path}: the unit of column {self._time} is ambiguous ({', '.join(rates)}): "
            "pass --trace-unit s or ms"
        )

    def _kind(self, unit: str) -> str:
        if self._names >= _BURSTGPT:
            return "BurstGPT"
        if self._names >= _AZURE:
            return "Azure"
        if self._ids is None:
            return ""
        return "Bailian" if self._names & _BAILIAN else "Mooncake" if unit == "ms" else ""


def _listed(ids: Any) -> Any:
    """The ids of a CSV cell, which are written as JSON; an empty cell has none."""
    if not isinstance(ids, str):
        return ids
    try:
        return json.loads(ids) if ids else None
    except (ValueError, RecursionError):
        return ids


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int | str) and not isinstance(one, bool) for one in value)


def _fits(record: _Record, block: int) -> bool:
    """Whether there are as many ids as the prompt has blocks; some files have none for a partial last block."""
    return len(record.ids) in (math.ceil(record.inputs / block), record.inputs // block)


def _stem(path: str) -> str:
    name = Path(path).name
    for suffix in (".gz", ".bz2", ".xz"):
        name = name.removesuffix(suffix)
    return Path(name).stem


def _compact(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _suffix(name: str) -> str | None:
    """The unit at the end of a column's name, as in timestamp_ms or "arrival (s)"."""
    words = re.split(r"[^a-z0-9]+", name.lower().rstrip(" )]_"))
    return _SUFFIXES.get(words[-1]) if len(words) > 1 else None


def _column(columns: list[str], known: list[str], *, units: bool = False) -> str | None:
    """The column with the first of the known names."""
    names: dict[str, str] = {}
    for column in columns:
        names.setdefault(_compact(column), column)
        if units and _suffix(column) is not None:
            words = re.split(r"[^a-z0-9]+", column.lower().rstrip(" )]_"))
            names.setdefault("".join(words[:-1]), column)
    return next((names[name] for name in known if name in names), None)


def _moment(value: Any) -> "float | _Date | None":
    """The number or date-time in a cell; None if it has neither."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return _finite(value)
    text = str(value).strip()
    if _NUMBER.fullmatch(text):
        return _finite(text)
    fraction = 0.0
    parts = _SECOND.fullmatch(text)
    if parts is not None:  # datetime truncates to microseconds; Azure's times have seven digits
        text, fraction = parts["whole"] + parts["zone"], float("0." + parts["fraction"])
    try:
        moment = datetime.fromisoformat(text.removesuffix(" UTC"))
    except ValueError:
        return None
    zone = moment.tzinfo is not None
    return _Date(int((moment if zone else moment.replace(tzinfo=UTC)).timestamp()), fraction, zone)


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _whole(value: Any) -> int:
    """A token count; 0 if the cell has none."""
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return 0
    number = _finite(value)
    return int(number) if number is not None and number == int(number) else 0


def _shown(value: Any) -> str:
    text = repr(value) if value is not None else "nothing"
    return text if len(text) <= 40 else text[:37] + "…"
