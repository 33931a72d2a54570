"""What the items of the GPU check run on: the GPU, or with `--stand-in` the CPU with interpreted kernels.

On the stand-in everything is tiny. It shows that the items have no errors; its times mean nothing.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tests.gpu.rows import Reporter
from tests.tiny import TINY

if TYPE_CHECKING:
    from engine.worker.device import Device

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


@dataclass(frozen=True)
class Load:
    """What `bench` measures. concurrency: closed loop; rates: open loop. least: req/s that must be sustained."""

    prompt: int
    output: int
    concurrency: int = 0
    requests: int = 0
    rates: tuple[float, ...] = ()
    window_s: float = 0.0
    least: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Shapes of all items. attention: rows and keys of decode launches, with the longest time in µs or none."""

    model: dict[str, Any]
    max_model_len: int
    rows: tuple[int, ...]
    context: int
    chunks: tuple[int, ...]
    steps: int
    attention: tuple[tuple[int, int, float | None], ...]
    prefill: int
    copy_bytes: int
    product: int
    repeats: int
    kernel_shapes: dict[str, int]  # hidden, vocabulary, context of rows, head dim
    loads: dict[str, Load]
    flags: tuple[str, ...] = ()  # of the server


GPU = Sizes(
    model=LLAMA,
    max_model_len=16384,
    rows=(1, 8, 64, 256),
    context=1500,
    chunks=(256, 512, 1024, 2048),
    steps=20,
    attention=((128, 1024, 200.0), (64, 4096, 375.0), (1, 8192, 25.0)),
    prefill=8192,
    copy_bytes=2 << 30,
    product=8192,
    repeats=20,
    kernel_shapes={"hidden": 4096, "vocabulary": 128256, "context": 700, "head_dim": 128},
    loads={
        "500/200, 64 at a time": Load(500, 200, concurrency=64, requests=128),
        "500/200, 256 at a time": Load(500, 200, concurrency=256, requests=512),
        "2048/128": Load(2048, 128, rates=(13.0, 15.0), window_s=12.0, least=13.0),
        "500/2000": Load(500, 2000, rates=(3.8,), window_s=90.0, least=3.8),
        "6000/4000": Load(6000, 4000, rates=(0.40,), window_s=120.0, least=0.40),
    },
    flags=("--max-num-seqs", "256"),
)
STAND_IN = Sizes(
    model=TINY,
    max_model_len=128,
    rows=(1, 3),
    context=20,
    chunks=(8,),
    steps=2,
    attention=((2, 40, None), (1, 70, None)),
    prefill=40,
    copy_bytes=1 << 16,
    product=16,
    repeats=1,
    kernel_shapes={"hidden": 48, "vocabulary": 300, "context": 20, "head_dim": 16},
    loads={
        "500/200, 64 at a time": Load(5, 2, concurrency=2, requests=2),
        "2048/128": Load(5, 2, rates=(4.0,), window_s=2.0, least=0.0),
    },
    flags=("--max-num-seqs", "4", "--kv-cache-memory-bytes", "4000000"),
)


@dataclass
class Environment:
    """Given to each item. folder: for files that all items share. stand_in: the CPU takes the GPU's place."""

    folder: Path
    stand_in: bool
    report: Reporter
    kept: dict[str, Any] = field(default_factory=dict)  # what later items of the process use

    @property
    def sizes(self) -> Sizes:
        return STAND_IN if self.stand_in else GPU

    def bar(self, limit: float | None) -> float | None:
        """A limit of speed; the stand-in has none."""
        return None if self.stand_in else limit

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu") if self.stand_in else torch.device("cuda", 0)

    @cached_property
    def device(self) -> "Device":
        """A device bound to this thread."""
        made = self.new_device()
        made.bind_thread()
        return made

    def new_device(self) -> "Device":
        if self.stand_in:
            from engine.worker.torch_device import TorchDevice

            return TorchDevice("cpu")
        from engine.worker.cuda_device import CudaDevice

        return CudaDevice()

    @property
    def target(self) -> str:
        """The tile tables' name of the device."""
        from engine.kernels.triton import launch, tiles

        return tiles.INTERPRETER if self.stand_in else launch.current_gpu().target

    def synchronize(self) -> None:
        if not self.stand_in:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object], *, captured: bool = True) -> float:
        """The median time of what `run` enqueues, with a cold L2 cache.

        captured: in a graph, so that the time to launch its kernels is left out.
        """
        device, repeats = self.device, self.sizes.repeats

        def once() -> None:
            run()

        once()
        again = device.capture(once) if captured else once
        cold = torch.empty(1 if self.stand_in else 256 << 20, dtype=torch.uint8, device=self.torch_device)
        times = []
        for _ in range(repeats):
            cold.zero_()
            began = device.clock()
            again()
            times.append(device.elapsed(began, device.clock()))
        return statistics.median(times)

    def model_folder(self) -> Path:
        """A folder with the model's configuration, for random weights."""
        made = self.folder / "model"
        made.mkdir(exist_ok=True)
        (made / "config.json").write_text(json.dumps(self.sizes.model))
        return made
