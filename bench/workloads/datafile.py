"""Rows of CSV, JSON and JSONL files: the reader of traces and data sets.

Accepts UTF-8 with and without a byte order mark, UTF-16 and UTF-32; any line ends; gzip, bzip2 and xz; several column
separators. Only CR and LF end a line: characters such as U+2028 belong to the text of a row. NaN, which pandas writes
for an empty cell, is read as null. An unreadable row is returned with its fault, so that the caller can report or skip
it.
"""

import bz2
import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from bench.errors import BenchError

_COMPRESSED = ((b"\x1f\x8b", gzip.GzipFile), (b"BZh", bz2.BZ2File), (b"\xfd7zXZ\x00", lzma.LZMAFile))
_FOREIGN = (
    (b"PK\x03\x04", "a ZIP archive or an Excel sheet"),
    (b"PAR1", "a parquet file"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd"),
    (b"\xd0\xcf\x11\xe0", "an Excel sheet"),
)
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's does, so it is tried first
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATORS = ",;\t|"
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SHOWN_ROWS = 5


@dataclass(frozen=True, slots=True)
class DataRow:
    """One row; if it cannot be read, `fault` is the reason and `fields` is empty."""

    where: str  # "row 3", with the line number if that differs
    fields: dict[str, Any]
    fault: str = ""


@dataclass(slots=True)
class RowFaults:
    """The bad rows of one file: an error that names them, or a note if they are to be skipped."""

    path: Path | str
    flag: str
    skip: bool = False
    found: list[tuple[str, str]] = field(default_factory=list)  # (where, where with the reason)

    def add(self, where: str, fault: str, joint: str = " ") -> None:
        self.found.append((where, f"{where}{joint}{fault}"))

    def check(self) -> None:
        """Raise BenchError if there are bad rows that are not to be skipped."""
        if self.found and not self.skip:
            more = f"; also {self._rows(self.found[1:])}" if len(self.found) > 1 else ""
            raise BenchError(
                f"{self.path}: {self.found[0][1]}{more}; use --skip-bad-rows to skip bad rows ({self.flag})"
            )

    def note(self) -> str:
        """A message about the skipped rows; "" if there are none."""
        if not self.found:
            return ""
        count = f"{len(self.found)} bad row{'s' if len(self.found) > 1 else ''}"
        return f"{self.path}: skipped {count}: {self._rows(self.found)} ({self.found[0][1]})"

    @staticmethod
    def _rows(found: list[tuple[str, str]]) -> str:
        names = [where for where, _ in found[:_SHOWN_ROWS]]
        more = f" and {len(found) - _SHOWN_ROWS} more" if len(found) > _SHOWN_ROWS else ""
        return ", ".join(names) + more


def read_table(path: Path, flag: str) -> list[DataRow]:
    """All rows of a CSV, JSON or JSONL file, recognized by its beginning; raises BenchError naming `flag`."""
    with _reading(path, flag, "neither CSV nor JSONL"), _open_text(path, flag) as text:
        start = _start(text)
        rows = _json_rows(start, text, "is neither CSV nor JSONL") if start.strip()[:1] in ("{", "[") else None
        return list(rows if rows is not None else _csv_rows(start, text))


def read_json(path: Path, flag: str) -> Iterator[DataRow]:
    """Rows of a JSON list or of a JSONL file, read lazily; raises BenchError naming `flag`."""
    with _reading(path, flag, "neither JSON nor JSONL"), _open_text(path, flag) as text:
        yield from _json_rows(_start(text), text, "is neither JSON nor JSONL")


def read_text(path: Path) -> str:
    """The whole text of a file in any of these encodings."""
    with _reading(path, "", "not a text file"), _open_text(path, "") as stream:
        text = stream.read()
        if not _encodable(text):
            raise ValueError("it contains bytes that are not valid UTF-8")
        return text.replace("\r\n", "\n")


@contextlib.contextmanager
def _reading(path: Path, flag: str, otherwise: str) -> Iterator[None]:
    """Turn the exceptions of reading into a BenchError that names the file."""
    named = f" ({flag})" if flag else ""
    try:
        yield
    except OSError as error:
        raise BenchError(f"{path} cannot be read: {error.strerror or error}{named}") from None
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise BenchError(f"{path}: the compressed data is damaged or truncated: {error}{named}") from None
    except (ValueError, csv.Error, RecursionError) as error:
        raise BenchError(f"{path} is {otherwise}: {error}{named}") from None


def _open_text(path: Path, flag: str) -> TextIO:
    # One pass and no seeking, so that pipes can be read too.
    stream: Any = path.expanduser().open("rb")
    start = stream.peek(8)
    for magic, what in _FOREIGN:
        if start.startswith(magic):
            stream.close()
            named = f" ({flag})" if flag else ""
            raise BenchError(f"{path} is {what}: unpack it, or export it as CSV or JSONL{named}")
    for magic, opener in _COMPRESSED:
        if start.startswith(magic):
            stream = io.BufferedReader(opener(fileobj=stream) if opener is gzip.GzipFile else opener(stream))
    encoding = _encoding(stream.peek(4096)[:4096])
    # Bytes that are not text become lone surrogates, which identify the row that contains them.
    return io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="")


def _encoding(start: bytes) -> str:
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name
    # Without a mark: in UTF-16 every second byte of ASCII characters is 0, which does not occur in UTF-8 texts.
    even, odd = start[0::2].count(0), start[1::2].count(0)
    if 4 * max(even, odd) > len(start):
        return "utf-16-be" if even > odd else "utf-16-le"
    return "utf-8"


def _start(text: TextIO) -> str:
    """The blank lines at the beginning and the first other line."""
    start = ""
    for line in text:
        start += line
        if line.strip().strip("\ufeff"):
            break
    return start


def _json_rows(start: str, rest: TextIO, otherwise: str) -> Iterator[DataRow]:
    if start.lstrip().lstrip("\ufeff").startswith("["):
        yield from _json_list(start + rest.read())
        return
    number = 0
    for line_number, line in enumerate(_lines(start, rest), 1):
        content = line.strip().strip("\ufeff")
        if not content:
            continue
        number += 1
        where = f"row {number}" if number == line_number else f"row {number} (line {line_number})"
        fault = "" if _encodable(content) else "contains bytes that are not valid UTF-8"
        value: Any = None
        if not fault:
            try:
                value = _parse(content)
            except RecursionError:
                fault = "is nested too deeply"
            except ValueError as error:
                fault = f"{otherwise}: {error}"
        yield _checked(where, value, fault, bool(_ESCAPED_SURROGATE.search(content)))


def _json_list(text: str) -> Iterator[DataRow]:
    rows = _parse(text)
    suspicious = not _encodable(text) or bool(_ESCAPED_SURROGATE.search(text))
    for number, row in enumerate(rows, 1):
        yield _checked(f"row {number}", row, "", suspicious)


def _checked(where: str, value: Any, fault: str, suspicious: bool) -> DataRow:
    if not fault and not isinstance(value, dict):
        fault = 'is not an object such as {"prompt": …}'
    if not fault and suspicious and not _encodable(json.dumps(value, ensure_ascii=False)):
        fault = "contains an unpaired surrogate (such as \\ud83d alone) or bytes that are not valid UTF-8"
    return DataRow(where, {}, fault) if fault else DataRow(where, value)


def _parse(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: None if name == "NaN" else float(name))


def _csv_rows(start: str, rest: TextIO) -> Iterator[DataRow]:
    lines = _lines(start, rest)
    header_lines = 0
    header: list[str] = []
    for line in lines:
        header_lines += 1
        if line.strip():
            separator = max(_SEPARATORS, key=line.count)
            header = [cell.strip().strip("\ufeff") for cell in next(csv.reader([line], delimiter=separator))]
            break
    named = [name for name in header if name]
    doubled = sorted({name for name in named if named.count(name) > 1})
    if doubled:
        raise ValueError(f"it has two columns {doubled[0]!r}")
    if not named:
        return
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    number = 0
    for cells in reader:
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        number += 1
        line_number = header_lines + reader.line_num
        where = f"row {number}" if line_number == number + 1 else f"row {number} (line {line_number})"
        yield _csv_row(where, header, cells)


def _csv_row(where: str, header: list[str], cells: list[str]) -> DataRow:
    while len(cells) > len(header) and not cells[-1]:
        cells.pop()
    if len(cells) != len(header):
        return DataRow(where, {}, f"has {len(cells)} fields, but the header has {len(header)}")
    if not all(map(_encodable, cells)):
        return DataRow(where, {}, "contains bytes that are not valid UTF-8")
    return DataRow(where, {name: cell for name, cell in zip(header, cells, strict=True) if name or cell})


def _lines(start: str, rest: TextIO) -> Iterator[str]:
    yield from io.StringIO(start, newline="")
    yield from rest


def _encodable(text: str) -> bool:
    """Whether the text has no unpaired surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
