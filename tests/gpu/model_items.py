"""Llama-3.1-8B with random weights made on the GPU: start, memory, time of steps and of attention, idle share."""

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from engine.config import EngineConfig
from engine.devices import machine_for
from engine.memory import resolve, with_measured
from engine.messages import MemoryLine
from engine.model.model_info import read_model_info
from engine.resolved_config import ResolvedConfig
from engine.worker.executor import make_executor
from tests.gpu.environment import Environment
from tests.gpu.step_driver import StepDriver, wait_for_graphs
from tests.perf import rooflines

NEAR = 0.03  # of the planned memory
SHARE = 0.75  # of the roofline that a decode step should reach
BARS_MS = {1: 7.5, 256: 28.0}  # of a decode step, by rows
MAX_IDLE = 0.03
PREFILL_TFLOPS = 450.0
MIXED_ROWS = 32
TOP_KERNELS = 14


@dataclass
class Started:
    """The executor of the model, and what was planned for it."""

    executor: Any
    resolved: ResolvedConfig
    planned: tuple[MemoryLine, ...]
    vocabulary: int
    seconds: float

    @cached_property
    def driver(self) -> StepDriver:
        return StepDriver(self.executor, self.resolved, self.vocabulary)


def _started(env: Environment) -> Started:
    """Start once in a process; items that follow use the same executor."""
    if "started" not in env.kept:
        began, sizes, folder = time.perf_counter(), env.sizes, str(env.model_folder())
        options: dict[str, Any] = {"load_format": "dummy", "max_model_len": sizes.max_model_len}
        if env.stand_in:
            from tests.engine.worker.device_driver import configure, start_executor

            options |= {"rows": 4, "block_size": 32, "num_blocks": 40}
            config, model_info, _ = configure(env.model_folder(), **options)
            resolution = resolve(config, model_info)
            executor: Any = start_executor(env.new_device(), env.model_folder(), use_triton=True, **options)[0]
        else:
            config = EngineConfig(model=folder, device="cuda", max_num_seqs=max(sizes.rows), **options)
            model_info = read_model_info(config)
            resolution = resolve(config, model_info, None, machine_for(config))
            executor = make_executor(config, model_info, resolution.config)
        env.kept.setdefault("close", []).append(executor.shutdown)
        resolution = with_measured(resolution, executor.num_blocks, executor.memory)
        seconds = time.perf_counter() - began
        env.kept["started"] = Started(executor, resolution.config, resolution.memory, model_info.vocab_size, seconds)
    started: Started = env.kept["started"]
    return started


def load(env: Environment) -> None:
    started, report = _started(env), env.report
    report.row(
        "start", started.seconds, "s", note=", ".join(f"{k} {v:.1f}" for k, v in started.executor.seconds.items())
    )
    report.row("kernels", started.executor.kernels, note="; ".join(started.executor.warnings))
    planned = sum(one.bytes for one in started.planned)
    lines = ", ".join(f"{one.what} {one.bytes / 2**30:.2f}" for one in started.planned)
    report.row("planned memory", planned / 2**30, "GiB", note=lines)
    if not env.stand_in:
        free, total = torch.cuda.mem_get_info()
        used = (total - free) / 2**30
        least, most = ((1 + sign * NEAR) * planned / 2**30 for sign in (-1, 1))
        report.row("used memory", used, "GiB", at_least=round(least, 2), at_most=round(most, 2))
    began = time.perf_counter()
    captured = wait_for_graphs(started.executor)
    if captured is None:
        report.row("graphs", None, note="skipped: steps are not captured")
    else:
        report.row("graphs", captured, "sizes", note=f"{time.perf_counter() - began:.1f} s")


def steps(env: Environment) -> None:
    """Decode steps and mixed steps, each beside its roofline."""
    started, sizes, model = _started(env), env.sizes, rooflines.Model()
    wait_for_graphs(started.executor)
    driver = started.driver
    for rows in sizes.rows:
        timed = driver.decode(rows, sizes.context, sizes.steps)
        measured, limit = statistics.median(timed.device), rooflines.decode_step(model, rows, sizes.context)["roofline"]
        share = limit / measured
        note = f"roofline {limit * 1e3:.2f} ms, {share:.0%} of it; a step in {timed.wall * 1e3:.2f} ms with run-ahead"
        name, bar = f"decode, {rows} rows after {sizes.context}", BARS_MS.get(rows)
        env.report.row(name, measured * 1e3, "ms", at_most=env.bar(bar), note=note, detail=timed.device)
        env.report.row(f"{name}, share of the roofline", share, at_least=env.bar(SHARE))
    for tokens in sizes.chunks:
        rows = min(MIXED_ROWS, max(sizes.rows), tokens - 1)
        if env.stand_in:
            rows = 1
        measured = driver.mixed(rows, sizes.context, tokens)
        products = 2.0 * model.parameters * tokens / rooflines.RATE
        note = f"products take at least {products * 1e3:.2f} ms"
        env.report.row(f"mixed, {rows} rows and a chunk, {tokens} tokens", measured * 1e3, "ms", note=note)


def attention_speed(env: Environment) -> None:
    """Decode and prefill attention of one layer, with the product's tiles."""
    sizes, model = env.sizes, rooflines.Model()
    for rows, context, bar in sizes.attention:
        seconds = env.seconds(_attention(env, rows, 1, context - 1))
        moved = rows * context * model.token_bytes / model.layers
        note = f"{moved / seconds / 1e12:.2f} TB/s, limit {moved / rooflines.BANDWIDTH * 1e6:.0f} µs"
        env.report.row(f"decode, {rows} rows of {context}", seconds * 1e6, "µs", at_most=env.bar(bar), note=note)
    n = sizes.prefill
    seconds = env.seconds(_attention(env, 1, n, 0))
    flops = 4.0 * model.heads * model.head_dim * n * (n + 1) / 2
    least = env.bar(PREFILL_TFLOPS)
    env.report.row(
        f"prefill, {n} tokens", flops / seconds / 1e12, "TFLOP/s", at_least=least, note=f"{seconds * 1e6:.0f} µs"
    )


def _attention(env: Environment, rows: int, tokens: int, computed: int) -> Any:
    """A launch of paged attention for `rows` rows of `tokens` tokens after `computed`, in the shape of the model."""
    from engine.kernels.triton.attention import AttentionShape, Partials, Rows, Scores, Work, paged_attention
    from engine.kernels.triton.kv_storage import LayerCache
    from engine.kernels.work_list import capacity, plan_work
    from engine.worker.triton_backend import default_tilings

    config, place, dtype = env.sizes.model, env.torch_device, torch.float32 if env.stand_in else torch.bfloat16
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    shape = AttentionShape(heads, kv_heads, config["hidden_size"] // heads, 32)
    tiling = default_tilings(shape, dtype.itemsize)
    blocks = -(-(computed + tokens) // shape.block_size)
    counts, before = np.full(rows, tokens, dtype=np.int64), np.full(rows, computed, dtype=np.int64)
    size = (rows * blocks + 1, kv_heads, shape.block_size, shape.head_dim)
    cache = LayerCache(*(torch.randn(size, dtype=dtype, device=place) for _ in range(2)))
    deal = np.random.default_rng(0).permutation(rows * blocks).reshape(rows, blocks) + 1

    def on_device(column: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(column, dtype=np.int32)).to(place)

    batch = Rows(on_device(deal), *map(on_device, (np.cumsum(counts) - counts, counts, before)))
    plan = plan_work(counts, before, tiling)
    work = Work(*(on_device(one) if len(one) else None for one in (plan.sizes, plan.decode, plan.prefill, plan.merges)))  # type: ignore[arg-type]
    query = torch.randn(rows * tokens, heads, shape.head_dim, dtype=dtype, device=place)
    out = torch.empty_like(query)
    partials = Partials.allocate(shape, capacity(tiling, rows, rows * tokens), place)
    scores = Scores(shape.head_dim**-0.5)
    return lambda: paged_attention(query, cache, out, batch, work, shape, tiling, scores, partials)


def idle(env: Environment) -> None:
    """The share of the time in which no kernel runs while steps follow each other."""
    events = _profiled(env, rows=max(n for n in env.sizes.rows if n <= 64), key="idle")
    spans = [(one["begin"], one["end"]) for one in events]
    if not spans:
        env.report.row("idle share", None, note="skipped: the profiler saw no kernels")
        return
    env.report.row("idle share", idle_share(spans), at_most=env.bar(MAX_IDLE), note=f"{len(spans)} kernels and copies")


def profile(env: Environment) -> None:
    """The kernels of a decode step of 64 rows by their time."""
    events = _profiled(env, rows=max(n for n in env.sizes.rows if n <= 64), key="idle")
    if not events:
        env.report.row("kernels of a step", None, note="skipped: the profiler saw no kernels")
        return
    for name, (microseconds, count) in by_time(events, env.sizes.steps)[:TOP_KERNELS]:
        env.report.row(name[:90], microseconds, "µs a step", note=f"{count:g} launches")


def _profiled(env: Environment, rows: int, key: str) -> list[dict[str, Any]]:
    """Kernels and copies of run-ahead decode steps, in µs."""
    if key in env.kept:
        known: list[dict[str, Any]] = env.kept[key]
        return known
    started = _started(env)
    wait_for_graphs(started.executor)
    activity = torch.profiler.ProfilerActivity.CPU if env.stand_in else torch.profiler.ProfilerActivity.CUDA
    profiler = torch.profiler.profile(activities=[activity])
    context, count = env.sizes.context, env.sizes.steps

    def begin() -> None:
        env.synchronize()
        profiler.start()

    def end() -> None:
        env.synchronize()
        profiler.stop()

    started.driver.decode_wall(rows, context, count, 3, begin, end)
    kind = torch.autograd.DeviceType.CPU if env.stand_in else torch.autograd.DeviceType.CUDA
    env.kept[key] = found = spans_of(profiler, kind)
    return found


def spans_of(profiler: Any, kind: Any) -> list[dict[str, Any]]:
    """What ran on a type of device, in µs."""
    return [
        {"name": event.name, "begin": event.time_range.start, "end": event.time_range.end}
        for event in profiler.events() or ()
        if event.device_type == kind
    ]


def idle_share(spans: Iterable[tuple[float, float]]) -> float:
    """The part of the time from the first begin to the last end that no span covers."""
    ordered = sorted(spans)
    first, busy, reached = ordered[0][0], 0.0, ordered[0][0]
    for begin, end in ordered:
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return 1 - busy / max(reached - first, 1e-9)


def by_time(events: Iterable[dict[str, Any]], steps: int) -> list[tuple[str, tuple[float, float]]]:
    """Names of kernels with their µs and launches a step, the longest first."""
    total: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        total[event["name"]][0] += event["end"] - event["begin"]
        total[event["name"]][1] += 1
    ordered = sorted(total.items(), key=lambda pair: -pair[1][0])
    return [(name, (time / steps, count / steps)) for name, (time, count) in ordered]
