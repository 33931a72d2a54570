"""`redline bench`: load one server and find the highest request rate it sustains."""

import dataclasses
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from bench.errors import BenchError
from bench.loadgen import Target
from bench.loadgen.probe import ServerFacts, probe_server
from bench.progress import ConsoleProgress, answer_text, points_table
from bench.results import Answer, RunFiles, Summary, utc_now
from bench.run import BenchOptions, InterruptedRunError, LostServerError, measure_configuration
from bench.server import ServerProcess, has_flag
from bench.workloads import make_workload
from cli.params import LENGTH, LIMIT, RATES, SHARE

_ANY_VOCABULARY = 32_000  # where only the lengths of a workload matter


@click.command(context_settings={"max_content_width": 110})
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="The server to load.")
@click.option("--model", help="Start a Redline server for this model instead; its flags follow after --.")
@click.option(
    "--input", "input_tokens", type=LENGTH, default="500", show_default=True, help="Prompt tokens: N or LOW:HIGH."
)
@click.option(
    "--output", "output_tokens", type=LENGTH, default="100", show_default=True, help="Tokens asked: N or LOW:HIGH."
)
@click.option("--prefix", type=click.IntRange(1), help="Tokens of a shared prefix before each prompt.")
@click.option(
    "--prefixes", type=click.IntRange(1), default=1, show_default=True, help="How many such prefixes there are."
)
@click.option("--rate", type=click.FloatRange(0, min_open=True), help="Measure this rate only, in requests/s.")
@click.option("--rates", type=RATES, help="Measure these rates: A,B,C.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of arrivals and prompts.")
@click.option("--precision", type=SHARE, default="10%", show_default=True, help="How closely to find the rate.")
@click.option(
    "--max-minutes", type=click.FloatRange(0, min_open=True), default=15.0, show_default=True, help="Hard limit."
)
@click.option(
    "--window", type=click.FloatRange(0, min_open=True), help="Seconds measured a load point, instead of the plan's."
)
@click.option(
    "--ladder/--no-ladder", default=True, show_default=True, help="After a search, rates of 0.25 … 1.5 x its answer."
)
@click.option(
    "--slo", "limits", type=LIMIT, multiple=True, help="A latency limit such as ttft_p99=2s; may be repeated."
)
@click.option("--served-model", "--model-name", "served_model", help="The model to ask for, if the server has several.")
@click.option("--api-key", help="Key of the server.")
@click.option("--tokenizer", help="Tokenizer folder, for a server that does not tell the size of its vocabulary.")
@click.option("--vocab-size", type=click.IntRange(2), help="The size itself.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder of result files.  [default: results/bench-DATE-TIME]"
)
@click.option(
    "--configuration", default="bench", show_default=True, help="Name of this configuration in tables and figures."
)
@click.argument("serve_flags", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def command(ctx: click.Context, **given: Any) -> None:
    """Find the highest request rate a server sustains, or measure given rates.

    Flags after -- go to the server that --model starts: redline bench --model smollm2-135m -- --max-num-seqs 16
    """
    _check(ctx, given)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe: nothing to fit into
    folder = given["out"] or Path("results") / f"bench-{datetime.now():%Y%m%d-%H%M%S}"
    files = RunFiles(folder)
    spec = _workload_spec(given)
    if given["model"] is None:
        facts = probe_server(given["url"], given["api_key"])
        ctx.exit(_run(console, files, given, spec, facts, given["url"]))
    flags = list(given["serve_flags"])
    if not has_flag(flags, "--max-model-len"):
        flags += ["--max-model-len", str(math.ceil(1.1 * make_workload(spec, _ANY_VOCABULARY).max_tokens))]
    if given["api_key"] and not has_flag(flags, "--api-key"):
        flags += ["--api-key", given["api_key"]]
    server = ServerProcess.redline(given["model"], flags, folder / "server.log")
    console.print(f"starting redline serve {given['model']} {' '.join(_shown(flags))} …", highlight=False)
    with server:
        try:
            facts = probe_server(server.base_url, given["api_key"])
            code = _run(console, files, given, spec, facts, server.base_url, serve=_shown(flags))
        except LostServerError as error:
            raise (error if server.alive() else BenchError(f"the server ended: {server.cause()}")) from None
    ctx.exit(code)


def _run(
    console: Console,
    files: RunFiles,
    given: dict[str, Any],
    spec: dict[str, Any],
    facts: ServerFacts,
    url: str,
    serve: list[str] | None = None,
) -> int:
    """Measure, print and write; returns the exit code."""
    workload = make_workload(spec, _vocabulary(given, facts))
    if facts.max_model_len is not None and workload.max_tokens > facts.max_model_len:
        raise BenchError(
            f"requests of up to {workload.max_tokens} tokens don't fit into the server's {facts.max_model_len} "
            "(--max-model-len of the server, or --input and --output)"
        )
    target = Target(url, given["served_model"] or facts.model, given["api_key"])
    options = _options(given)
    name = given["configuration"]
    described: dict[str, Any] = {"model": target.model, "server": facts.kind}
    described |= {"url": url} if serve is None else {"serve": [given["model"], *serve]}
    asked = {k: v for k, v in dataclasses.asdict(options).items() if v}
    summary = Summary(
        title=f"{workload.name} on {target.model}",
        seed=options.seed,
        configurations={name: described | {"options": asked}},
        workloads={workload.name: workload.describe()},
    )
    files.write_summary(summary)
    code, answer, lost = 0, None, None
    try:
        answer = measure_configuration(target, workload, options, files, name, ConsoleProgress(console))
        code = 0 if answer is not None else 1
    except InterruptedRunError as interrupted:
        answer, code = interrupted.answer, 130
    except LostServerError as error:
        answer, lost = error.answer, error
    _finish(console, files, summary, answer)
    if lost is not None:
        raise lost
    return code


def _finish(console: Console, files: RunFiles, summary: Summary, answer: Answer | None) -> None:
    summary.answers = [answer] if answer is not None else []
    summary.finished = utc_now()
    files.write_summary(summary)
    points = files.read_points()
    if any(p.phase != "probe" for p in points):
        console.print()
        console.print(points_table(points, title=summary.title))
        for point in points:
            if not point.valid:
                console.print(f"INVALID at {point.rate:g} req/s: {point.reason}", style="yellow", highlight=False)
    console.print(f"results: {files.folder}", highlight=False)
    if answer is None:
        console.print("no load point could be judged", style="bold")
        return
    if answer.note:
        console.print(answer.note, highlight=False)
    console.print(answer_text(answer))


def _check(ctx: click.Context, given: dict[str, Any]) -> None:
    if given["serve_flags"] and given["model"] is None:
        raise click.UsageError(f"{given['serve_flags'][0]!r}: flags of a server need --model, which starts one")
    if given["rate"] is not None and given["rates"] is not None:
        raise click.UsageError("give either --rate or --rates")
    if given["model"] is not None and ctx.get_parameter_source("url") is ParameterSource.COMMANDLINE:
        raise click.UsageError("give either --url, a server that runs, or --model, which starts one")
    if given["prefix"] is None and ctx.get_parameter_source("prefixes") is ParameterSource.COMMANDLINE:
        raise click.UsageError("--prefixes needs --prefix, the length of each")


def _workload_spec(given: dict[str, Any]) -> dict[str, Any]:
    lengths = {"input": given["input_tokens"], "output": given["output_tokens"]}
    if given["prefix"] is None:
        return {"kind": "random", **lengths}
    return {"kind": "shared-prefix", "prefix": given["prefix"], "prefixes": given["prefixes"], **lengths}


def _options(given: dict[str, Any]) -> BenchOptions:
    rates = [given["rate"]] if given["rate"] is not None else given["rates"]
    return BenchOptions(
        seed=given["seed"],
        precision=given["precision"],
        max_minutes=given["max_minutes"],
        rates=rates,
        ladder=given["ladder"],
        window_s=given["window"],
        limits=dict(given["limits"]),
    )


def _vocabulary(given: dict[str, Any], facts: ServerFacts) -> int:
    if given["vocab_size"] is not None:
        return int(given["vocab_size"])
    if given["tokenizer"] is not None:
        return _tokenizer_size(given["tokenizer"])
    if facts.vocab_size is None:
        raise BenchError("the server does not tell the size of its vocabulary: give --vocab-size or --tokenizer")
    return facts.vocab_size


def _tokenizer_size(name: str) -> int:
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        from tokenizers import Tokenizer

        try:
            return int(Tokenizer.from_file(str(path)).get_vocab_size())
        except Exception as error:  # the library raises plain Exception
            raise BenchError(f"{path} can't be read as a tokenizer: {error} (--tokenizer)") from None
    from transformers import AutoTokenizer

    try:
        return len(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise BenchError(f"no tokenizer at {name!r}: {first} (--tokenizer)") from None


def _shown(flags: list[str]) -> list[str]:
    """The flags without secrets: they are printed and written to the summary."""
    shown = list(flags)
    for i, flag in enumerate(shown):
        key = flag.partition("=")[0].replace("_", "-")
        if key == "--api-key":
            shown[i] = f"{key}=***" if "=" in flag else flag
            if "=" not in flag and i + 1 < len(shown):
                shown[i + 1] = "***"
    return shown
