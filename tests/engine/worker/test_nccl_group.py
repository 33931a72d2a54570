"""The group of GPUs over a backend that works without one: gloo in processes, with tensors of a device for the rest."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import EngineDeadError
from engine.worker.nccl_group import NcclGroup
from engine.worker.rank_store import LOOPBACK, StoreServer

RANK = """
import sys
import torch
from engine.worker.nccl_group import NcclGroup

rank = int(sys.argv[1])
group = NcclGroup(rank, 2, sys.argv[2], torch.device("cpu"), "gloo")
for on_device in (False, True):
    if on_device:  # takes the path of tensors of the device
        torch.Tensor.device = property(lambda self: torch.device("meta"))
    mine = torch.tensor([[1, 2], [3, 4]]) + 10 * rank
    gathered = group.all_gather(mine)
    summed = group.all_reduce(mine)
    assert summed.data_ptr() == mine.data_ptr()
    print(gathered.tolist(), summed.tolist(), group.smallest(7 - rank))
group.close()
"""
EXPECTED = "[[1, 2, 11, 12], [3, 4, 13, 14]] [[12, 14], [16, 18]] 6"


@pytest.mark.parametrize("tcp", [False, True], ids=["one machine", "several machines"])
def test_collectives_of_the_device_and_of_the_host_give_the_same(tcp: bool, tmp_path: Path) -> None:
    server = StoreServer(LOOPBACK) if tcp else None
    place = str(tmp_path / "store") if server is None else server.place(LOOPBACK)
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), place], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=120)[0].splitlines() for rank in ranks] == [[EXPECTED] * 2] * 2
    assert [rank.returncode for rank in ranks] == [0, 0]
    if server is not None:
        server.close()


def test_a_build_of_torch_without_the_backend_is_named(tmp_path: Path) -> None:
    import torch

    if torch.distributed.is_nccl_available():
        pytest.skip("this build of PyTorch has NCCL")
    with pytest.raises(EngineDeadError, match="the ranks could not join by nccl: "):
        NcclGroup(0, 1, str(tmp_path / "store"), torch.device("cpu"))
