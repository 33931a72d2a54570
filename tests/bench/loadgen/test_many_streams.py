"""Loads with more streams than a host has files or ports for, and more than are checked at a time."""

import errno
import itertools
import os
import resource
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from bench.errors import BenchError
from bench.loadgen import connection, load, loop, process, run_closed_loop
from bench.loadgen.connection import ReceiveBuffer
from bench.loadgen.request import Address
from bench.target import Target
from bench.workloads import RequestSpec
from tests.bench.loadgen.process import Quiet

pytestmark = pytest.mark.usefixtures("patient_generator")

EVER = (-1.0, float("inf"))


@pytest.fixture
def few_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files for some connections more than there are now, a limit that the load generator does not raise."""
    monkeypatch.setattr(process, "allow_open_files", lambda count: count)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = (number for number in itertools.count() if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (next(itertools.islice(free, 8, None)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_lack_of_files_makes_the_load_invalid(known_server: Any, few_files: None) -> None:
    recording = known_server.run([3] * 40, itl=0.05)
    health = recording.health
    rows = recording.records(EVER)
    lacking = [row for row in rows if row.status == "generator"]
    assert {row.error for row in lacking} == {"too many open files: raise the limit of the generator (`ulimit -n`)"}
    assert sum(row.status == "ok" for row in rows) == 40 - len(lacking) > 0
    assert health.saturated
    assert health.reason.startswith(f"it could not open {len(lacking)} connections ({lacking[0].error})")


def test_a_lack_of_ports_is_named(known_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []

    def connect(address: Address, buffer: ReceiveBuffer) -> connection.Connection:
        opened.append(1)
        if len(opened) > 2:
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
        return connection.connect(address, buffer)

    monkeypatch.setattr(loop, "connect", connect)
    recording = known_server.run([3] * 4)
    assert [row.status for row in recording.records(EVER)] == ["ok", "ok", "generator", "generator"]
    assert "could not open 2 connections (no free port: widen net.ipv4.ip_local_port_range" in recording.health.reason


def test_a_closed_loop_that_needs_more_files_does_not_begin(known_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "allow_open_files", lambda count: min(count, 1000))
    target, specs = Target(known_server.url, "{}"), [RequestSpec(1, 2, prompt_ids=[1])] * 2000
    with pytest.raises(
        BenchError, match=r"^2000 streams need 2320 open files in a process, and 1000 are allowed: .*-n"
    ):
        run_closed_loop(target, specs, 2000, observer=Quiet(), time_limit_s=60)
    recording = run_closed_loop(target, specs[:5], 2000, observer=Quiet(), time_limit_s=60)
    assert [row.status for row in recording.records(EVER)] == ["ok"] * 5


def test_missed_ends_are_found_a_few_at_a_time(known_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_MOST_CHECKS", 1)
    recording = known_server.run([2, 3, 4], list(np.zeros(3)), fault="no end")
    assert [(row.status, row.output_tokens) for row in recording.records(EVER)] == [("ok", 2), ("ok", 3), ("ok", 4)]
    assert not recording.cut_short
