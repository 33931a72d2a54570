"""`redline generate`, and `redline bench` and `redline sweep` that let it send their load."""

import math
import re
import shlex
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from bench.generators import clocks
from bench.generators.handshake import TOKEN_VARIABLE
from bench.results import RunFiles
from bench.target.server import ServerProcess
from cli.generator_options import AddressType
from cli.main import main
from tests.bench.generators.process import TOKEN, GeneratorProcess
from tests.docs.blocks import BLOCKS
from tests.docs.runner import run_command

pytestmark = pytest.mark.usefixtures("patient_generator", "_prepared")

STUB = Path(__file__).parents[1] / "bench" / "queue_server.py"
SIZES = ["--input", "20", "--output", "5"]


@pytest.fixture
def _prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of the runs, and no limit for clocks: on a busy machine a round trip may take long."""
    monkeypatch.setattr(clocks, "LIMIT_S", math.inf)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("stub")
    command = [sys.executable, str(STUB), "--port", "{port}", "--slots", "4", "--service", "0.1"]
    with ServerProcess(command, folder / "server.log", start_limit_s=60) as server:
        yield server


@pytest.fixture(scope="module")
def pair() -> Iterator[list[GeneratorProcess]]:
    with GeneratorProcess() as first, GeneratorProcess() as second:
        yield [first, second]


def named(pair: list[GeneratorProcess]) -> list[str]:
    return ["--generators", ",".join(one.address for one in pair)]


def test_given_rates_from_two_generators(
    stub: ServerProcess, pair: list[GeneratorProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    load = [*SIZES, "--rates", "10,90", "--window", "1", "--precision", "20%", "--max-minutes", "1"]
    assert main(["bench", "--url", stub.base_url, *load, *named(pair), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1].startswith("sustains 10 req/s")
    assert f"generators: {pair[0].address} (" in said
    files = RunFiles(out)
    probe, *points = files.read_points()
    assert [p.verdict for p in points] == ["sustained", "not sustained"]
    for point in points:
        assert point.generators.count(";") == 1
        assert all(one.address in point.generators for one in pair)
        assert point.clock_drift_ms is not None
        assert point.clock_error_ms is not None
        assert point.clock_error_ms >= point.clock_drift_ms
        assert point.generator_processes == 2
    assert ";" not in probe.generators
    assert files.read_summary().configurations["bench"]["generators"] == [one.address for one in pair]
    rows = files.read_requests(points[0].point_id)
    assert rows["index"].tolist() == sorted(rows["index"])
    assert rows.intended_s.is_monotonic_increasing
    parts = [one for one in files.read_generators() if one.point_id == points[0].point_id]
    assert [one.generator for one in parts] == [one.address for one in pair]
    assert {one.generator: one.sent for one in parts} == rows.generator.value_counts().to_dict()
    for part in parts:
        assert part.requests >= part.sent > 0
        assert part.lateness_p99_ms is not None
        assert part.us_per_chunk is not None
        assert (part.processes, part.lost) == (1, False)
    assert [f"{one.generator}:{one.clock_offset_ms:+.3f}" for one in parts] == [
        text.rpartition(":")[0] for text in points[0].generators.split(";")
    ]
    assert any("requests sent" in line for line in pair[0].lines)


def test_a_closed_loop_from_two_generators(
    stub: ServerProcess, pair: list[GeneratorProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    load = [*SIZES, "--concurrency", "4", "--num-requests", "12", "--out", str(out)]
    assert main(["bench", "--url", stub.base_url, *load, *named(pair)]) == 0
    point = RunFiles(out).read_points()[-1]
    assert (point.phase, point.concurrency, point.completed) == ("closed", 4, 12)
    assert all(one.address in point.generators for one in pair)
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("concurrency 4: ")


def test_a_sweep_from_two_generators(pair: list[GeneratorProcess], tmp_path: Path) -> None:
    command = " ".join([sys.executable, str(STUB), "--port", "{port}", "--service", "0.03"])
    data = {
        "configurations": {"stub": {"command": command}},
        "workloads": [{"kind": "random", "input": 8, "output": 4, "rates": [20]}],
        "options": {"window": 0.4, "max_minutes": 0.5},
    }
    path, out = tmp_path / "stubs.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(data))
    assert main(["sweep", str(path), "--out", str(out), *named(pair)]) == 0
    files = RunFiles(out)
    assert all(one.address in files.read_points()[-1].generators for one in pair)
    assert files.read_summary().configurations["stub"]["generators"] == [one.address for one in pair]


def test_a_killed_generator_is_named_and_what_was_measured_is_kept(
    stub: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    load = [*SIZES, "--rates", "10,12,14", "--window", "2", "--precision", "20%", "--max-minutes", "2"]
    with GeneratorProcess() as kept, GeneratorProcess() as lost:

        def kill() -> None:
            while len(RunFiles(out).read_points()) < 2:  # the probe and the first rate
                time.sleep(0.05)
            while sum("requests sent" in line for line in lost.lines) < 1:
                time.sleep(0.05)
            time.sleep(1.5)
            lost.kill()

        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        code = main(
            [
                "bench",
                "--url",
                stub.base_url,
                *load,
                *named([kept, lost]),
                "--generator-timeout",
                "0.2",
                "--out",
                str(out),
            ]
        )
        killer.join()
    said = capsys.readouterr()
    assert code == 1
    assert said.err.startswith(f"redline: error: generator {lost.address} cannot be reached: connection refused")
    assert f"INVALID at 12 req/s: generator {lost.address} was lost during the load: it " in said.out
    assert said.out.strip().splitlines()[-1].startswith("sustains 10 req/s")
    files = RunFiles(out)
    points = files.read_points()
    assert [(p.rate, p.verdict) for p in points[1:]] == [(10, "sustained"), (12, "invalid")]
    assert f"{lost.address}:" in points[2].generators
    assert points[2].generators.count(":lost") == 1
    rows = files.read_requests(points[2].point_id)
    assert (rows.status == "ok").sum() >= 1
    assert set(rows.generator) == {kept.address}
    gone = [one for one in files.read_generators() if one.lost]
    assert [(one.point_id, one.generator, one.sent) for one in gone] == [(points[2].point_id, lost.address, 0)]
    assert (gone[0].cpu_s, gone[0].clock_drift_ms, gone[0].lateness_p99_ms) == (None, None, None)


def test_errors_are_one_line(
    stub: ServerProcess, pair: list[GeneratorProcess], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    bench = ["bench", "--url", stub.base_url, *SIZES, "--rate", "10"]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]

    def error(arguments: list[str], code: int) -> str:
        assert main(arguments) == code
        return capsys.readouterr().err.removeprefix("redline: error: ")

    unreachable = error([*bench, "--generators", f"127.0.0.1:{port}", "--generator-timeout", "0"], 1)
    advice = f"check that `redline generate --listen 0.0.0.0:{port}` runs there"
    assert unreachable == f"generator 127.0.0.1:{port} cannot be reached: connection refused; {advice}\n"
    (tmp_path / "token").write_text("a wrong token of the tests\n")
    wrong = error([*bench, *named(pair), "--generator-token-file", "token"], 1)
    assert wrong.count("refused this run: it has another token (--generator-token-file of the run, ") == 2
    assert "'host1' is not an address: use HOST:PORT" in error([*bench, "--generators", "host1"], 2)
    assert "h:1 is named twice" in error([*bench, "--generators", "h:1,g:2,h:1"], 2)
    assert "--generator-ca needs --generators" in error([*bench, "--generator-ca", "system"], 2)
    assert "--generator-timeout needs --generators" in error([*bench, "--generator-timeout", "5"], 2)
    assert "cannot be read as certificates" in error([*bench, *named(pair), "--generator-ca", "none.pem"], 1)
    simulated = ["bench", "--device", "sim:h100", "--model", "m", *named(pair)]
    assert "--generators has no meaning with --device sim:h100" in error(simulated, 2)
    assert "--generators cannot be combined with --offline" in error(["bench", "--offline", "m", *named(pair)], 2)
    sweep = ["sweep", "--preset", "articles", "--device", "sim:h100", *named(pair)]
    assert "all configurations of this sweep are simulated" in error(sweep, 2)
    busy = error(["generate", "--listen", pair[0].address], 1)
    assert busy == f"cannot listen on {pair[0].address}: Address already in use (--listen)\n"
    unknown = error(["generate", "--listen", "host.invalid:7070"], 1)
    assert re.fullmatch(r"cannot listen on host\.invalid:7070: .*name.* \(--listen\)\n", unknown, re.IGNORECASE)
    assert "'7070' is not an address: use HOST:PORT" in error(["generate", "--listen", "7070"], 2)
    monkeypatch.delenv(TOKEN_VARIABLE)
    assert "generators need a token: give --token-file, or set REDLINE_" in error(["generate", "--listen", "h:0"], 1)
    assert "generators need a token: give --generator-token-file, or" in error([*bench, *named(pair)], 1)


def test_the_blocks_of_the_page(stub: ServerProcess, tmp_path: Path) -> None:
    """Those of docs/measuring/hosts.md, one after the other, with other ports."""
    blocks = [one for one in BLOCKS if one.page == "docs/measuring/hosts.md" and one.tested_by]
    assert len(blocks) == 3
    generators = []
    for command in [command for block in blocks for command in block.commands]:
        if command.startswith("redline generate"):
            flags = shlex.split(command)[2:]
            assert flags[:2] == ["--listen", "127.0.0.1:7070"]
            flags[flags.index("--token-file") + 1] = str(tmp_path / "token")
            generators.append(GeneratorProcess(*flags[2:], token=""))
            continue
        for generator in generators:
            command = command.replace("127.0.0.1:7070", generator.address)
        for _ in range(3):  # a busy machine can make a load point invalid
            done = run_command(command, "bash", tmp_path, httpx.URL(stub.base_url).port)
            if done.succeeded:
                break
        assert done.succeeded, done.output
    for generator in generators:
        assert any("requests sent" in line for line in generator.lines)
        generator.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it(number: int, code: int) -> None:
    with GeneratorProcess() as generator:
        generator.process.send_signal(number)
        assert generator.process.wait(30) == code


def test_addresses() -> None:
    convert = AddressType().convert
    assert convert("host1:7070", None, None) == ("host1", 7070)
    assert convert("[fd00::5]:7070", None, None) == ("fd00::5", 7070)
    assert AddressType(least_port=0).convert("0.0.0.0:0", None, None) == ("0.0.0.0", 0)
    for wrong in ("host1", "host1:", ":7070", "host1:0", "host1:70700", "fd00::5:7070", "http://h:1", "h:1/x"):
        with pytest.raises(Exception, match="is not an address"):
            convert(wrong, None, None)
