"""What a rank's node reports, what ranks get of their nodes, and a rank that its host starts."""

import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import ConfigError
from engine.worker.rank_host import HostFacts, RankHost, check_versions, fair_memory, host_facts, ranks_beside
from engine.worker.rank_protocol import RankOptions, TcpLink

PATIENCE_S = 60.0


def facts(host: str, memory: int) -> HostFacts:
    return HostFacts(host, memory, 8, "")


hosts = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1 << 40)), min_size=1, max_size=5)


@given(hosts)
def test_all_ranks_get_the_same_and_no_host_gives_more_than_it_has(given_hosts: list[tuple[int, int]]) -> None:
    ranks = [facts(f"host {i}", memory) for i, (count, memory) in enumerate(given_hosts) for _ in range(count)]
    each, rest = divmod(fair_memory(ranks), len(ranks))
    assert rest == 0
    assert all(each * count <= memory for count, memory in given_hosts)
    assert any((each + 1) * count > memory for count, memory in given_hosts), "there was room for more"


@given(hosts)
def test_a_rank_knows_its_place_on_its_host(given_hosts: list[tuple[int, int]]) -> None:
    ranks = [facts(f"host {i}", memory) for i, (count, memory) in enumerate(given_hosts) for _ in range(count)]
    expected = [number for count, _ in given_hosts for number in range(count)]
    assert [rank - ranks_beside(ranks, rank)[0] for rank in range(len(ranks))] == expected
    assert [ranks_beside(ranks, rank)[1] for rank in range(len(ranks))] == [
        count for count, _ in given_hosts for _ in range(count)
    ]


def test_a_machine_has_cores_and_memory() -> None:
    found = host_facts()
    assert found.cores >= 1
    assert found.memory > 0
    assert found.versions.startswith("Redline ")
    assert found.host == host_facts().host


def test_a_rank_that_can_not_reach_its_executor_says_so_to_its_host() -> None:
    link = TcpLink("tcp://127.0.0.1:1", "tcp://127.0.0.1:1", "0" * 64, 0.2)
    options = RankOptions(rank=3, config={}, model_info={}, resolved={}, answers=True, receives=True, link=link)
    host = RankHost("node 10.0.0.2")
    pid, name = host.start(msgspec.msgpack.encode(options))
    assert name == f"rank 3 on node 10.0.0.2 (process {pid})"
    deadline = time.monotonic() + PATIENCE_S
    while (ended := host.ended(1.0)) is None:
        assert time.monotonic() < deadline
    message = f"{name}: tcp://127.0.0.1:1 can't be reached: nothing has answered for 0.2 s"
    assert ended == ("EngineDeadError", message)
    assert host.ended(0.0) == ended, "it can be asked twice"
    assert host.state() == ""


def test_a_rank_is_killed_by_its_host() -> None:
    link = TcpLink("tcp://127.0.0.1:1", "tcp://127.0.0.1:1", "0" * 64, 60.0)
    options = RankOptions(rank=0, config={}, model_info={}, resolved={}, answers=True, receives=True, link=link)
    host = RankHost("node 10.0.0.2")
    host.start(msgspec.msgpack.encode(options))
    assert host.ended(0.0) is None
    host.kill()
    kind, message = host.ended(PATIENCE_S) or ("", "")
    assert kind == "EngineDeadError"
    assert "was killed by SIGKILL" in message


def test_a_node_with_other_versions_is_named() -> None:
    here = host_facts()
    check_versions("10.0.0.2", here, here)
    other = msgspec.structs.replace(here, versions="Redline 0.1, Python 3.14.0")
    with pytest.raises(ConfigError) as raised:
        check_versions("10.0.0.2", other, here)
    expected = f"node 10.0.0.2 runs Redline 0.1, Python 3.14.0, this machine {here.versions}: install the same"
    assert str(raised.value) == expected


def test_a_host_has_fingerprints_of_its_files(tmp_path: Path) -> None:
    host = RankHost("node 10.0.0.2")
    assert host.fingerprints(str(tmp_path / "none"), ["a"]) is None
    (tmp_path / "a").write_bytes(b"1")
    assert set(host.fingerprints(str(tmp_path), ["a", "b"]) or {}) == {"a"}
