"""KV blocks that are copied between the device and host memory (`--kv-spill`): the bytes, and the bandwidth."""

import torch

from engine.columns import column, int32s
from engine.host_blocks import HostBlocks
from engine.messages import COPY_IN, COPY_OUT
from engine.worker.device_kv_blocks import DeviceBlocks
from tests.gpu.environment import Environment

PARTS, PART_BYTES, BLOCKS = 64, 32 << 10, 128  # Llama-3.1-8B in bfloat16: 32 layers, blocks of 16 tokens
STAND_IN = (3, 64, 8)
LEAST_GB_S = 10.0  # PCIe 4 has 25 GB/s, PCIe 5 50 GB/s


def kv_blocks(env: Environment) -> None:
    """Copy all blocks out of the cache, and in to other places."""
    parts, part_bytes, count = STAND_IN if env.stand_in else (PARTS, PART_BYTES, BLOCKS)
    device, generator = env.device, torch.Generator().manual_seed(5)
    known = [torch.randint(0, 256, (count, part_bytes), dtype=torch.uint8, generator=generator) for _ in range(parts)]
    cache = [device.zeros((2 * count, part_bytes), torch.uint8) for _ in range(parts)]
    for part, values in zip(cache, known, strict=True):
        part[:count].copy_(values.to(env.torch_device))
    host = HostBlocks(count, (parts * part_bytes,))
    blocks = DeviceBlocks(device, cache)
    blocks.attach(**host.attachment)
    order = torch.randperm(count, generator=generator).tolist()
    out = [(COPY_OUT, block, order[block]) for block in range(count)]
    back = [(COPY_IN, 2 * count - 1 - block, order[block]) for block in range(count)]
    for name, copies in (("out", out), ("in", back)):
        packed, times = int32s(column(copies), 3), []
        for _ in range(1 + env.sizes.repeats):  # the first one also makes buffers
            began = device.clock()
            blocks.copy(packed)
            times.append(device.elapsed(began, device.clock()))
        rate = count * parts * part_bytes / min(times) / 1e9
        env.report.row(f"{count} blocks {name}", rate, "GB/s", at_least=env.bar(LEAST_GB_S))
    whole = torch.cat(known, 1)
    there = [bytes(host.parts(order[block])[0]) == whole[block].numpy().tobytes() for block in range(count)]
    env.report.row("bytes in host memory", "right" if all(there) else "wrong", passed=all(there))
    moved = torch.cat([part[count:].cpu().flip(0) for part in cache], 1)
    same = bool(torch.equal(moved, whole))
    env.report.row("bytes on the device", "right" if same else "wrong", passed=same)
