"""What other processes had of the cores: the arithmetic on made counters, and real processes that compute."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bench.measurement.load_point import LoadPoint, PointPlan
from bench.measurement.machine import Counters, CpuShares, MachineReader, record_shares, shares
from bench.measurement.progress import point_line, points_table
from bench.measurement.server import HttpServer
from bench.results import PointRecord, RunFiles
from bench.search.windows import Timing
from bench.target import Target
from bench.target.metrics import MetricsReader
from bench.target.server import ServerProcess
from bench.workloads import make_workload
from tests.bench.records import plain_point

BEGIN = Counters(at_s=100.0, cores=4, busy_s=1000.0, steal_s=50.0, server_s=300.0, generator_s=20.0)


def later(**used: float) -> Counters:
    """Counters ten seconds later, in which so much was used."""
    return replace(BEGIN, at_s=110.0, **{name: getattr(BEGIN, name) + seconds for name, seconds in used.items()})


@pytest.mark.parametrize(
    ("used", "others", "steal"),
    [
        ({"busy_s": 30.0, "server_s": 20.0, "generator_s": 4.0}, 0.15, 0.0),
        ({"busy_s": 24.0, "server_s": 20.0, "generator_s": 4.0}, 0.0, 0.0),
        ({"busy_s": 23.0, "server_s": 20.0, "generator_s": 4.0}, 0.0, 0.0),  # ticks are counted less exactly
        ({"busy_s": 10.0, "server_s": 10.0, "steal_s": 8.0}, 0.0, 0.2),
        ({"busy_s": 50.0}, 1.0, 0.0),
    ],
)
def test_shares_of_the_cores(used: dict[str, float], others: float, steal: float) -> None:
    found = shares(BEGIN, later(**used))
    assert (found.others, found.steal) == (pytest.approx(others), pytest.approx(steal))


def test_what_isnt_known_is_no_share() -> None:
    unknown = CpuShares(None, None)
    assert shares(None, later()) == shares(BEGIN, None) == unknown
    assert shares(BEGIN, replace(later(), at_s=100.1)) == unknown  # too short for clock ticks
    assert shares(BEGIN, replace(later(), cores=2)) == unknown
    row = plain_point()
    record_shares(row, None, None)
    assert (row.others_cpu_share, row.steal_share, row.disturbed, row.disturbance) == (None, None, False, "")


@pytest.mark.parametrize(
    ("used", "disturbed", "words"),
    [
        ({"busy_s": 3.9}, False, ""),
        ({"busy_s": 4.1}, True, "other processes used 10% of the cores"),
        ({"busy_s": 2.4, "steal_s": 2.0}, True, "other processes used 6% of the cores and the hypervisor took 5%"),
    ],
)
def test_more_than_a_tenth_disturbs(used: dict[str, float], disturbed: bool, words: str) -> None:
    row = plain_point()
    record_shares(row, BEGIN, later(**used))
    assert (row.disturbed, row.disturbance) == (disturbed, words)


def test_the_mark_is_in_files_lines_and_tables(tmp_path: Path) -> None:
    row = plain_point(others_cpu_share=0.34, steal_share=0.0, disturbed=True)
    RunFiles(tmp_path).write_points([row])
    (read,) = RunFiles(tmp_path).read_points()
    assert (read.others_cpu_share, read.steal_share, read.disturbed) == (0.34, 0.0, True)
    assert "disturbed: other processes used 34% of the cores" in point_line(row).plain
    console = Console(width=140, record=True)
    console.print(points_table([row, plain_point(rate=2.0)]))
    text = console.export_text()
    assert "disturbed" in text
    assert "34%" in text
    console.print(points_table([plain_point()]))
    assert "disturbed" not in console.export_text()


SPIN = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass\n"
LISTEN = (
    "import socket, subprocess, sys\n"
    "s = socket.create_server(('127.0.0.1', 0))\n"
    "print(s.getsockname()[1], flush=True)\n"
)


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started = []

    def run(code: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
        )
        return started[-1]

    yield run
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_process_that_computes_disturbs_a_real_load_point(
    queue_server: Callable[..., ServerProcess], start: Callable[[str], subprocess.Popen[str]]
) -> None:
    server = queue_server("--slots", "4", "--service", "0.1")
    hogs = [start("print(flush=True)\n" + SPIN) for _ in range(2)]
    for hog in hogs:
        assert hog.stdout is not None
        hog.stdout.readline()
    workload = make_workload({"kind": "random", "input": 20, "output": 5}, 1000)
    reader = MetricsReader(server.base_url)
    machine = MachineReader(server.base_url)
    target = Target(server.base_url, "stub")
    point = LoadPoint(HttpServer(target), workload, "c", reader, 0, 0.2, lambda: 60.0, machine=machine)
    row: PointRecord = point.run(
        PointPlan(10.0, "fixed", 0, Timing(0.2, 1.5, 5.0), 0.1, cut_overload=False), lambda _: None
    )[0]
    assert row.disturbed
    assert row.others_cpu_share is not None
    assert row.others_cpu_share > 0.25


def test_the_servers_own_processes_are_no_others(start: Callable[[str], subprocess.Popen[str]]) -> None:
    child = f"subprocess.Popen([sys.executable, '-c', {SPIN!r}])\n"
    server = start(LISTEN + child + SPIN)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    machine = MachineReader(f"http://127.0.0.1:{port}")
    time.sleep(0.3)
    before = machine.read()
    time.sleep(1.0)
    after = machine.read()
    assert before is not None
    assert after is not None
    used = after.server_s - before.server_s
    alone = shares(before, replace(after, server_s=before.server_s)).others
    with_server = shares(before, after).others
    assert used > 0.2  # of both processes; neighbours may have the rest
    assert alone is not None
    assert with_server is not None
    assert with_server < alone
    (listener,) = (p for p in machine._server() if p.pid == server.pid)
    assert len(machine._server()) == 2
    assert listener.pid == server.pid


def test_generators_that_other_commands_started_are_no_others(start: Callable[[str], subprocess.Popen[str]]) -> None:
    server, generator = start(LISTEN + "import time; time.sleep(60)"), start("print(flush=True)\n" + SPIN)
    assert server.stdout is not None
    assert generator.stdout is not None
    port = int(server.stdout.readline())
    generator.stdout.readline()
    machine = MachineReader(f"http://127.0.0.1:{port}", [generator.pid, 2**30])  # the second one is gone
    before = machine.read()
    time.sleep(1.0)
    after = machine.read()
    assert before is not None
    assert after is not None
    used = after.generator_s - before.generator_s
    assert used > 0.2
    unknown, known = (shares(before, replace(after, generator_s=after.generator_s - s)).others for s in (used, 0.0))
    assert unknown is not None
    assert known is not None
    assert known < unknown


def test_a_server_elsewhere_says_nothing() -> None:
    assert MachineReader("http://192.0.2.1:8000").read() is None
    assert MachineReader("http://127.0.0.1:1").read() is None
    assert MachineReader("http://no-such-host.invalid").read() is None
