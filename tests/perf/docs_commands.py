"""`make docs-commands`: runs the pages whose commands take more time than the tests have, from top to bottom.

Pages are README.md, CONTRIBUTING.md and those in docs/ with a block marked `<!-- needs: minutes -->`. Blocks that need
anything else are left out. Each page has a folder of its own, and a server of SmolLM2-135M if it measures one without
starting it. A line is printed for each command: exit code, seconds, page, command. All of it with the ends of outputs
goes to results/docs-commands.json. Exit code 1 if a command failed. All pages take some four hours.

PAGES=docs/getting-started.md,README.md picks pages.
"""

import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from tests.docs.blocks import BLOCKS, MINUTES, Block, is_serve
from tests.docs.runner import Done, prepare_folder, run_command, serving
from tests.engine.worker.driver import build_model
from tests.engine.worker.lora_files import LLAMA, write_adapter

RESULTS = Path("results") / "docs-commands.json"
LIMIT_S = 4 * 3600.0  # of one command
SERVER = "redline serve smollm2-135m"
TAIL = 2000  # characters of an output that are kept
ADAPTERS = ("sql", "chat", "code")  # their names on docs/serving/adapters.md


@dataclass
class Record:
    page: str
    line: int
    command: str
    seconds: float
    code: int
    succeeded: bool
    output: str


class Page:
    """Runs the blocks of one page in order; a server that the page starts runs until it starts the next one."""

    def __init__(self, folder: Path):
        self._folder = prepare_folder(folder / "page")
        self._placeholders: dict[str, str] = {}
        self._root = folder
        self._server = contextlib.ExitStack()
        self._port: int | None = None

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def run(self, block: Block) -> Iterator[Done]:
        for printed in block.commands:
            command = self._filled_in(printed)
            if block.kind == "bash" and is_serve(command):
                yield self._start(command)
                continue
            if self._port is None and needs_server(command):
                self._start(SERVER)
            yield run_command(command, block.kind, self._folder, self._port, LIMIT_S)

    def _filled_in(self, command: str) -> str:
        """The command with a model and adapters in place of MODEL and /adapters/."""
        if not re.search(r"\bMODEL\b|/adapters/", command):
            return command
        self._placeholders = self._placeholders or make_model(self._root)
        for placeholder, path in self._placeholders.items():
            command = command.replace(placeholder, path)
        return command

    def _start(self, command: str) -> Done:
        """Exit code 0 once it is ready."""
        self._server.close()
        self._port = None
        begin = time.monotonic()
        more = ("--enable-runtime-lora",) if "--lora" in command else ()
        try:
            served = self._server.enter_context(serving(command, self._folder, *more))
        except AssertionError as error:
            return Done(command, time.monotonic() - begin, 1, str(error))
        self._port = httpx.URL(served.url).port
        return Done(command, time.monotonic() - begin, 0, served.output())


def make_model(folder: Path) -> dict[str, str]:
    """What stands for placeholders: a tiny model with random weights, and adapters of it."""
    model = build_model("llama", folder / "model", head_dim=16)
    for seed, name in enumerate(ADAPTERS):
        write_adapter(folder / "adapters" / name, model, LLAMA, seed)
    return {"MODEL": str(folder / "model"), "/adapters/": f"{folder}/adapters/"}


def needs_server(command: str) -> bool:
    bench = re.match(r"\S*redline bench ", command) and "--model" not in command
    return bool(bench) or "localhost:8000" in command


def pages() -> dict[str, list[Block]]:
    """The blocks to run, by page."""
    found: dict[str, list[Block]] = {}
    for block in BLOCKS:
        if block.executable and block.needs <= {MINUTES}:
            found.setdefault(block.page, []).append(block)
    chosen = os.environ.get("PAGES")
    names = chosen.split(",") if chosen else list(found)
    unknown = [name for name in names if name not in found]
    if unknown:
        sys.exit(f"no page with commands: {', '.join(unknown)} (PAGES)")
    return {name: found[name] for name in names if chosen or any(one.needs for one in found[name])}


def main() -> None:
    records: list[Record] = []
    RESULTS.parent.mkdir(exist_ok=True)
    for name, blocks in pages().items():
        with tempfile.TemporaryDirectory() as folder, Page(Path(folder)) as page:
            for block in blocks:
                for done in page.run(block):
                    output = done.output[-TAIL:]
                    records.append(
                        Record(name, block.line, done.command, done.seconds, done.code, done.succeeded, output)
                    )
                    shown = f"{done.seconds:8.1f} s  {block.where}  {done.command.splitlines()[0]}"
                    print(f"{done.code:3d} {shown}", flush=True)
                    RESULTS.write_text(json.dumps([asdict(one) for one in records], indent=1) + "\n")
    failed = [one for one in records if not one.succeeded]
    for one in failed:
        print(f"\n{one.page}:{one.line}: exit code {one.code}\n{one.command}\n{one.output}")
    print(f"{len(records)} commands, {len(failed)} failed: {RESULTS}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
