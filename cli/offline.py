"""`redline bench --offline MODEL`: throughput of the engine without a server, with its caches on and off."""

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.errors import BenchError
from bench.measurement.offline import LLMEngine, OfflinePoint, known_points, with_repeats
from bench.results import PointRecord, RunFiles, Summary
from bench.workloads import ANY_VOCABULARY, make_workload
from cli.closed import write_summary
from cli.exit_codes import FAILED
from cli.serve import engine_config
from engine.config import EngineConfig

DEFAULT_REQUESTS = 32
# What is changed for each configuration. All that keeps results of earlier requests counts as a cache.
CACHES: dict[str, dict[str, Any]] = {
    "caches off": {"enable_prefix_caching": False, "mm_cache_gb": 0.0, "ablate": ("no-encoder-cache",)},
    "caches on": {},
}
_ONLINE = ("rate", "rates", "concurrency", "trace", "window", "warmup", "generators", "save_vllm_json")


def check_offline(ctx: click.Context, params: dict[str, Any]) -> None:
    """Raise UsageError for flags that contradict --offline, or need it."""
    repeats = params["repeat"]
    if params["offline"] is None:
        if isinstance(repeats, list):
            raise click.UsageError("several values of --repeat need --offline; a search has one")
        return
    for name in _ONLINE:
        if params[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} cannot be combined with --offline, which has no server")
    if params["model"] is not None or ctx.get_parameter_source("url") is click.core.ParameterSource.COMMANDLINE:
        raise click.UsageError("use --offline MODEL, or a server with --url or --model, not both")


def run_offline(console: Console, files: RunFiles, params: dict[str, Any], spec: dict[str, Any]) -> int:
    """Measure each share of repetitions with each configuration, print and write; returns the exit code."""
    repeats = params["repeat"]
    specs = with_repeats(spec, repeats) if isinstance(repeats, list) else [spec]
    count, seed = params["num_requests"] or DEFAULT_REQUESTS, params["seed"]
    shapes = [make_workload(one, ANY_VOCABULARY) for one in specs]
    flags = list(params["serve_flags"])
    config = engine_config(params["offline"], flags)
    if config.max_model_len is None:
        most = max(workload.max_tokens for workload in shapes)
        config = engine_config(params["offline"], [*flags, "--max-model-len", str(math.ceil(1.1 * most))])
    summary = Summary(
        title=f"{params['offline']} offline",
        seed=seed,
        configurations={
            name: {"model": params["offline"], "serve": flags, "offline": True, "changed": changed}
            for name, changed in CACHES.items()
        },
        workloads={workload.name: workload.describe() for workload in shapes},
    )
    files.write_summary(summary)
    records: list[PointRecord] = []
    try:
        for name, changed in CACHES.items():
            records += _measure(console, files, _options(config, changed), (name, specs, count, seed))
    except BenchError as error:
        summary.failures["offline"] = str(error)
        write_summary(files, summary)
        raise
    failed = write_summary(files, summary)
    console.print(offline_table(records))
    console.print(f"results: {files.folder}", highlight=False, soft_wrap=True)
    if failed is not None:
        raise failed
    return 0 if all(record.valid for record in records) else FAILED


def _options(config: EngineConfig, changed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration with changes, as arguments of LLM; V0 has none of V1's parts to switch off."""
    options = {one.name: getattr(config, one.name) for one in fields(config)} | changed
    ablated = changed.get("ablate", ()) if config.engine == "v1" else ()
    return options | {"ablate": (*config.ablate, *(name for name in ablated if name not in config.ablate))}


def _measure(
    console: Console,
    files: RunFiles,
    options: dict[str, Any],
    plan: tuple[str, list[dict[str, Any]], int, int],
) -> list[PointRecord]:
    """The records of one configuration; those that an earlier run of the same folder has are kept."""
    name, specs, count, seed = plan
    known = [record for record in files.read_points() if record.seed]
    records: list[PointRecord] = []
    console.print(f"{name}: loading {options['model']} …", highlight=False)
    with LLMEngine(**options) as engine:
        for spec in specs:
            workload = make_workload(spec, engine.vocab_size, engine.encode)
            point = OfflinePoint(engine, workload, name, count, seed)
            found = known_points(known, point)
            if found is None:
                with _bar(console) as bar:
                    task = bar.add_task(workload.name, total=count)
                    found, requests = point.run(partial(bar.advance, task))
                files.add_point(found, requests)
            console.print(f"{workload.name}, {name}: {found.achieved_rate:.3g} req/s", highlight=False)
            records.append(found)
    return records


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def offline_table(records: Sequence[PointRecord]) -> Table:
    """Requests per second by workload and configuration, and their ratio."""
    table = Table(title="Offline throughput, requests/s")
    table.add_column("workload")
    for name in (*CACHES, "ratio"):
        table.add_column(name, justify="right")
    rates = {(record.workload, record.configuration): record.achieved_rate for record in records}
    for workload in dict.fromkeys(record.workload for record in records):
        off, on = (rates.get((workload, name)) for name in CACHES)
        cells = ["" if rate is None else f"{rate:.3g}" for rate in (off, on)]
        table.add_row(workload, *cells, f"{on / off:.2f}" if on and off else "")
    return table
