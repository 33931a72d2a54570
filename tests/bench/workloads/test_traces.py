"""Traces as they are published: arrival times, lengths and shared prefixes as replayed, and bad rows by number."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.workloads import make_workload
from bench.workloads.arrivals import Arrivals
from bench.workloads.traces import read_trace

MOONCAKE: list[dict[str, Any]] = [
    {"timestamp": 27000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 48]},
    {"timestamp": 30000, "input_length": 1400, "output_length": 20, "hash_ids": [46, 47, 49]},
    {"timestamp": 30500, "input_length": 1050, "output_length": 9, "hash_ids": [46, 47, 48]},
    {"timestamp": 33000, "input_length": 600, "output_length": 3, "hash_ids": [50, 51]},
]
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45,ChatGPT,1087,230,1317,Conversation log\n"
    "118,GPT-4,417,276,693,API log\n"
)
AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319600,3180,8\n"
    "2023-11-16 18:17:05.2299600,110,27\n"
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def workload(path: str, **fields: Any) -> Any:
    return make_workload({"kind": "trace", "trace": path, **fields}, 32_000)


def test_mooncake_has_milliseconds_lengths_and_blocks(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "m.jsonl", jsonl(MOONCAKE)))
    assert (trace.kind, trace.unit, trace.block_tokens, trace.unused) == ("Mooncake", "ms", 512, ())
    assert trace.times.tolist() == [0.0, 3.0, 3.5, 6.0]
    assert trace.rate == 0.5
    assert (trace.inputs, trace.outputs) == ([1100, 1400, 1050, 600], [52, 20, 9, 3])
    assert "shared prefixes in blocks of 512 tokens" in trace.summary()


def test_mooncakes_prompts_are_equal_where_their_ids_are(tmp_path: Path) -> None:
    path = write(tmp_path / "m.jsonl", jsonl(MOONCAKE))
    first, second, third, fourth, *again = (r.prompt_ids or [] for r in workload(path).requests(8, 5))
    assert [len(p) for p in (first, second, third, fourth)] == [1100, 1400, 1050, 600]
    assert first[:1024] == second[:1024]
    assert first[:1050] == third
    assert sum(a == b for a, b in zip(first[1024:], second[1024:], strict=False)) < 3
    assert sum(a == b for a, b in zip(first[:512], first[512:1024], strict=True)) < 3
    assert fourth[:88] != first[:88]
    # Neither the next pass through the trace nor another load point finds these prefixes in a cache.
    assert len(again[0]) == 1100
    assert again[0][:1024] == again[1][:1024]
    assert again[0][:8] != first[:8]
    other = workload(path).requests(1, 6)[0].prompt_ids or []
    assert other[:8] != first[:8]
    assert [r.prompt_ids for r in workload(path).requests(3, 5)] == [first, second, third]
    assert make_workload(workload(path).describe(), 32_000).requests(8, 5) == workload(path).requests(8, 5)


def test_a_trace_at_its_own_rate_keeps_its_own_times(tmp_path: Path) -> None:
    rows = [m | {"timestamp": at} for m, at in zip(MOONCAKE, (0, 1007, 1013, 2990), strict=True)]
    path = write(tmp_path / "m.jsonl", jsonl(rows))
    rate = float(f"{read_trace(path).rate:.4g}")  # as load points round it
    times = Arrivals(trace=path).schedule(rate, (0.0, 2.0, 1.5), 1)
    assert times.tolist() == [0.0, 1.007, 1.013, 2.99]


def test_bailians_blocks_are_of_16_tokens_and_its_times_in_seconds(tmp_path: Path) -> None:
    rows = [
        {"chat_id": i, "parent_chat_id": -1, "timestamp": at, "input_length": n, "output_length": 7, "hash_ids": ids}
        for i, (at, n, ids) in enumerate([(61.1, 40, [1, 2, 3]), (62.6, 33, [1, 2, 4]), (70.0, 16, [5])])
    ]
    path = write(tmp_path / "q.jsonl", jsonl(rows))
    trace = read_trace(path)
    assert (trace.kind, trace.unit, trace.block_tokens) == ("Bailian", "s", 16)
    assert trace.times == pytest.approx([0, 1.5, 8.9])
    first, second, _ = (r.prompt_ids or [] for r in workload(path).requests(3, 0))
    assert first[:32] == second[:32]
    assert first[32] != second[32]


def test_burstgpt_has_seconds_and_names_with_spaces(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "b.csv", BURSTGPT))
    assert (trace.kind, trace.unit) == ("BurstGPT", "s")
    assert trace.times.tolist() == [0, 40, 113]
    assert (trace.inputs, trace.outputs) == ([472, 1087, 417], [18, 230, 276])
    assert "unused columns: Model, Total tokens, Log Type" in trace.summary()


def test_azure_has_date_times_of_seven_digits(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "a.csv", AZURE))
    assert (trace.kind, trace.unit) == ("Azure", "date-times")
    assert trace.times == pytest.approx([0, 0.052, 1.25], abs=1e-9)
    assert (trace.inputs, trace.outputs) == ([4808, 3180, 110], [10, 8, 27])
    zoned = AZURE.replace("600,", "600+00:00,").replace("18:17:05", "18:18:05")
    assert read_trace(write(tmp_path / "z.csv", zoned)).times == pytest.approx([0, 0.052, 61.25], abs=1e-9)


@pytest.mark.parametrize(
    ("header", "cells", "times"),
    [
        ("timestamp_ms", ("0", "1500"), [0, 1.5]),
        ("arrival (ms)", ("10", "1510"), [0, 1.5]),
        ("arrival_s", ("0", "1500"), [0, 1500]),
        ("arrived_at", ("0.25", "1.75"), [0, 1.5]),
        ("timestamp", ("1700000000", "1700000600"), [0, 600]),
        ("timestamp", ("1700000000000", "1700000001500"), [0, 1.5]),
        ("ts", ("1700000000000000", "1700000001500000"), [0, 1.5]),
        ("timestamp", ("2024-05-10T00:00:00Z", "2024-05-10T00:00:01.5Z"), [0, 1.5]),
    ],
)
def test_units_are_found(header: str, cells: tuple[str, str], times: list[float], tmp_path: Path) -> None:
    text = f"{header},num_prefill_tokens,num_decode_tokens\n{cells[0]},5,2\n{cells[1]},6,3\n"
    trace = read_trace(write(tmp_path / "t.csv", text))
    assert trace.times.tolist() == times
    assert (trace.inputs, trace.outputs) == ([5, 6], [2, 3])


def test_a_unit_that_nothing_says_is_asked_for(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "hash_ids"} for row in MOONCAKE]
    path = write(tmp_path / "m.jsonl", jsonl(rows))
    with pytest.raises(BenchError, match=r"unit of column timestamp .*0\.0005 req/s.*0\.5 req/s.*--trace-unit"):
        read_trace(path)
    assert read_trace(path, "ms").times.tolist() == [0.0, 3.0, 3.5, 6.0]
    assert read_trace(path, "s").times.tolist() == [0.0, 3000.0, 3500.0, 6000.0]
    with pytest.raises(BenchError, match=r"date-times.*--trace-unit"):
        read_trace(write(tmp_path / "a.csv", AZURE), "ms")
    with pytest.raises(BenchError, match=r"'min' is not a valid time unit.*--trace-unit"):
        read_trace(path, "min")


BAD: list[tuple[str, str]] = [
    (
        BURSTGPT.replace(",18,", ",0,").replace(",276,", ",0,"),
        "row 1 needs an integer.*, not '0'; also row 3",
    ),
    (BURSTGPT.replace("45,", "nan,"), "row 2 has no number in column Timestamp: 'nan'"),
    (BURSTGPT.replace("45,", "inf,"), "row 2 has no number"),
    (BURSTGPT.replace("1087", "1e999"), "row 2 needs an integer"),
    (BURSTGPT.replace("1087", "10.5"), "row 2 needs an integer"),
    (BURSTGPT.replace("45,ChatGPT,", "45,"), "row 2 has 5 fields, but the header has 6"),
    (BURSTGPT.replace("\n45,", "\n,,,,,\n\n45x,"), r"row 2 \(line 5\) has no number"),
    (AZURE.replace("18:17:04", "25:17:04"), "row 2 has no date-time"),
    (AZURE.replace("2023-11-16 18:17:04.0319600", "17"), "row 2 has no date-time"),
    (jsonl(MOONCAKE[:1]) + "{oops\n" + jsonl(MOONCAKE[1:]), "row 2 is neither CSV nor JSONL"),
    (jsonl([*MOONCAKE[:1], MOONCAKE[1] | {"timestamp": True}, *MOONCAKE[2:]]), "row 2 has no number"),
    (jsonl([*MOONCAKE[:1], MOONCAKE[1] | {"hash_ids": [1]}, *MOONCAKE[2:]]), "row 2 has 1 ids.*3 blocks of 512"),
    (jsonl([*MOONCAKE[:1], MOONCAKE[1] | {"hash_ids": "46"}, *MOONCAKE[2:]]), "row 2 has no list of ids"),
]


@pytest.mark.parametrize(("text", "words"), BAD)
def test_bad_rows_are_named_and_can_be_left_out(text: str, words: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.dat", text)
    with pytest.raises(BenchError, match=f"{words}.*--skip-bad-rows"):
        read_trace(path)
    if "also" in words:
        return  # one row is left
    trace = read_trace(path, skip_bad_rows=True)
    kept = {"Time": [0, 113], "TIME": [0, 1.25], '{"ti': [0, 3, 3.5, 6] if "oops" in text else [0, 3.5, 6]}[text[:4]]
    assert trace.times.tolist() == pytest.approx(kept)
    assert trace.skipped.startswith(f"{path}: skipped 1 bad row: row 2")
    assert trace.skipped in workload(path, skip_bad_rows=True).notes()


def test_what_isnt_known_is_said_and_replaces_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "timestamp,prompt_size,output_tokens\n1,9,2\n2,9,3\n")
    with pytest.raises(BenchError, match=r"no column input_tokens \(unknown columns: prompt_size\): pass --input"):
        workload(path)
    replaced = workload(path, input=[4, 6])
    assert [r.output_tokens for r in replaced.requests(2, 0)] == [2, 3]
    assert {r.input_tokens for r in replaced.requests(40, 0)} == {4, 5, 6}
    assert (replaced.name, replaced.max_tokens) == ("trace t input 4-6", 9)
    with pytest.raises(BenchError, match="has no column timestamp: its columns are when, input_tokens"):
        read_trace(write(tmp_path / "u.csv", "when,input_tokens\n1,2\n2,2\n"))
    with pytest.raises(BenchError, match="two columns 'time'"):
        read_trace(write(tmp_path / "v.csv", "time,time\n1,2\n2,2\n"))


def test_a_larger_trace_is_read_in_the_order_of_its_times(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    at = rng.permutation(500)
    lines = "".join(f"{t / 10};{10 + t};{1 + t % 7}\r\n" for t in at)
    trace = read_trace(write(tmp_path / "t.csv", "\ufefftimestamp;input_tokens;output_tokens\r\n" + lines))
    assert trace.times == pytest.approx(np.arange(500) / 10)
    assert trace.inputs == list(range(10, 510))
    assert trace.outputs == [1 + t % 7 for t in range(500)]


def test_ids_in_a_cell_and_a_list_of_rows(tmp_path: Path) -> None:
    cells = "".join(
        f'{row["timestamp"]},{row["input_length"]},{row["output_length"]},"{row["hash_ids"]}"\n' for row in MOONCAKE
    )
    path = write(tmp_path / "m.csv", "timestamp,input_length,output_length,hash_ids\n" + cells)
    assert read_trace(path).hash_ids == [(46, 47, 48), (46, 47, 49), (46, 47, 48), (50, 51)]
    listed = read_trace(write(tmp_path / "m.json", json.dumps(MOONCAKE, indent=1)))
    assert (listed.hash_ids, listed.unit) == (read_trace(path).hash_ids, "ms")


def test_a_trace_of_bad_rows_alone_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "timestamp\n1\nx\ny\n")
    with pytest.raises(BenchError, match=r"at least two requests.*skipped 2 bad rows: row 2, row 3"):
        read_trace(path, skip_bad_rows=True)
