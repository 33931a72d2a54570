"""The device itself: what it is, how fast it copies and multiplies, and what happens when its memory is used up."""

import platform
import subprocess
import sys

import torch

from engine.config import EngineConfig
from engine.devices import machine_for
from tests.gpu.environment import Environment

START_S = 60.0
NEAR = 0.9  # of the ceilings that tests/perf/rooflines.py assumes


def facts(env: Environment) -> None:
    import triton

    from tests.perf.rooflines import BANDWIDTH, RATE

    report, sizes = env.report, env.sizes
    if env.stand_in:
        report.row("card", f"stand-in ({platform.processor() or platform.machine()})")
    else:
        properties = torch.cuda.get_device_properties(0)
        report.row("card", properties.name, note=f"capability {properties.major}.{properties.minor}")
        report.row("memory", properties.total_memory / 2**30, "GiB")
        report.row("multiprocessors", properties.multi_processor_count)
        report.row("driver", machine_for(EngineConfig(model="", device="cuda")).describe(EngineConfig(model="")))
    report.row("torch", torch.__version__)
    report.row("triton", triton.__version__)
    report.row("python", platform.python_version())
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=env.torch_device)
    target = torch.empty_like(source)
    seconds = env.seconds(lambda: target.copy_(source))
    least = env.bar(NEAR * BANDWIDTH / 1e12)
    report.row("copy, read and written", 2 * sizes.copy_bytes / seconds / 1e12, "TB/s", at_least=least)
    n = sizes.product
    a, b = (torch.randn(n, n, device=env.torch_device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = env.seconds(lambda: torch.mm(a, b, out=out))
    least = env.bar(NEAR * RATE / 1e12)
    report.row(f"product, bfloat16, {n}", 2 * n**3 / seconds / 1e12, "TFLOP/s", at_least=least)


def out_of_memory(env: Environment) -> None:
    """A KV cache that does not fit ends `redline serve` with one line that has figures."""
    device = "cpu" if env.stand_in else "cuda"
    command = [sys.executable, "-m", "cli.main", "serve", str(env.model_folder()), "--load-format", "dummy"]
    command += ["--device", device, "--max-model-len", str(env.sizes.max_model_len), "--port", "0"]
    command += ["--kv-cache-memory-bytes", str(1 << 50)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    text = said[-1] if said else f"exit status {done.returncode}"
    is_clear = done.returncode != 0 and "--kv-cache-memory-bytes" in text and any(map(str.isdigit, text))
    env.report.row("a cache of 1 PiB", text[:300], passed=is_clear, detail=done.stderr.splitlines()[-30:])
