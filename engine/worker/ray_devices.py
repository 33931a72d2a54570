"""What ranks on the nodes of a Ray cluster run on: the CPU, or a GPU for each."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.config import EngineConfig
from engine.devices import cuda, machine_for, probe
from engine.devices.cuda import CudaMachine
from engine.devices.machine import Machine
from engine.devices.probe import DeviceFacts
from engine.errors import ConfigError
from engine.executor_backend import BACKEND, RAY


@dataclass(frozen=True, slots=True)
class Resources:
    """What Ray reserves for each rank, in its words, and how it places ranks.

    Each node adds memory bandwidth, of which ranks on the CPU never have enough. GPUs of one node exchange data faster.
    """

    of_rank: dict[str, int]
    strategy: str

    @property
    def scarce(self) -> str:
        """The resource that decides how many ranks fit."""
        return "GPU" if "GPU" in self.of_rank else "CPU"


CPUS = Resources({"CPU": 1}, "SPREAD")
GPUS = Resources({"CPU": 1, "GPU": 1}, "PACK")


def choose(config: EngineConfig, gpus: int) -> Resources:
    """What the ranks need, given the number of GPUs in the cluster.

    `--device auto` takes GPUs if there is one for each rank, and this build of PyTorch can use them.

    Raises ConfigError for devices that ranks on several machines don't run on.
    """
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{BACKEND} {RAY} does not run ranks on {config.device}: give --device cpu or cuda")
    build = probe.torch_build()
    usable = gpus >= config.num_ranks and ("cuda" in build or "hip" in build)
    if config.device == "cpu" or (config.device == "auto" and not usable):
        return CPUS
    if config.kv_spill:
        raise ConfigError(f"{BACKEND} {RAY} does not work with --kv-spill on GPUs: leave the flag out")
    return GPUS


def machine_of(config: EngineConfig, gpus: Sequence[tuple[str, DeviceFacts]]) -> Machine:
    """The machine for planning, given the address of each rank's node and its GPU; on the CPU there are none.

    Raises ConfigError if a GPU can't be used, or not with the other options.
    """
    if not gpus:
        return machine_for(replace(config, device="cpu"))
    for address, facts in gpus:
        if facts.error:
            raise ConfigError(f"node {address}: {facts.error}: use --device cpu")
    machine = CudaMachine(config, cuda.of_ranks([facts for _, facts in gpus]), cuda.has_triton())
    if config.tile_table is None:
        machine.tile_table = ""  # the one in this user's cache may be missing on other nodes
    return machine
