"""The load of thousands of streams, and the hosts of its generators."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from tests.perf.generator_hosts import hosts
from tests.perf.generator_streams import TOKENS, _open_at, load_of


@pytest.mark.parametrize("streams", [2000, 10_000])
def test_requests_arrive_at_the_rate_that_keeps_the_streams_open(streams: int) -> None:
    load = load_of(streams)
    assert load.rate * load.answer_s == pytest.approx(streams)
    assert load.rate * TOKENS == pytest.approx(10_000, rel=0.05)
    flags = dict(zip(load.flags()[::2], load.flags()[1::2], strict=True))
    assert float(flags["--warmup"]) > load.answer_s
    assert float(flags["--window"]) > load.answer_s


def test_open_streams() -> None:
    rows = pd.DataFrame({"intended_s": [0.0, 1.0, 2.0], "sent_s": [0.0, 1.1, 2.0], "e2e_s": [1.5, None, 1.0]})
    assert _open_at(rows, np.array([-1.0, 0.5, 1.05, 1.2, 1.6, 2.5, 9.0])).tolist() == [0, 1, 1, 2, 1, 2, 1]


def test_hosts_are_gone_afterwards() -> None:
    with hosts(2) as found:
        assert len(found.generators) == 2
        for host in found.generators:
            code = f"import socket; socket.create_server(('{host.address}', 0)); print('listening')"
            done = subprocess.run([*host.prefix, sys.executable, "-c", code], capture_output=True, text=True)
            assert done.stdout == "listening\n", done.stderr
    if found.server != "127.0.0.1":
        names = [host.prefix[-1] for host in found.generators]
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert not any(name in left for name in names)
