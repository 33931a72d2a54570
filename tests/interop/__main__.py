"""`make interop`: the clients that people use, unchanged, against real servers: does each feature work?

Each client has an environment of its own, .interop/CLIENT, made on first use with the versions of clients.py. One that
can't be installed is skipped, with the reason. VLLM_PYTHON, GUIDELLM_PYTHON and AIPERF_PYTHON name interpreters that
have these tools already. CLIENTS=openai,litellm selects clients. Rows go to results/interop.json: client, version,
feature, passed (null: skipped), seconds, note; what clients and servers print goes to results/interop. STORE=1 writes
them into tests/interop/table.json and docs/serving/clients.md too. The exit code is 1 if a feature failed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from engine.model.resolve import resolve_model
from tests.interop import page
from tests.interop.clients import SERVERS, Client, selected
from tests.interop.environments import MissingError, interpreter_of
from tests.interop.inputs import pictures, questions
from tests.interop.rows import Row, rows_of_output, terminal_table, write_rows
from tests.serving import serve

RESULTS = Path("results") / "interop.json"
LOGS = Path("results") / "interop"
CHECKS = Path(__file__).parent / "checks"
CLIENT_S = 900.0
# No client may look for a model or a price list in the network, nor go through a proxy to this machine.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
    "OPENAI_API_KEY": "none",
    "PYTHONNOUSERSITE": "1",
}


class Servers:
    """Servers that start when the first client needs them."""

    def __init__(self, stack: ExitStack):
        self.stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="interop-")))
        self.targets: dict[str, dict[str, Any]] = {}

    def target(self, kind: str) -> dict[str, Any]:
        """What the checks get of a kind of SERVERS."""
        if kind not in self.targets:
            wanted = SERVERS[kind]
            served = self.stack.enter_context(serve(LOGS, wanted.model, *wanted.flags))
            folder = resolve_model(wanted.model)
            self.targets[kind] = {
                "url": served.url,
                "model": wanted.model,
                "folder": str(folder),
                "pictures": pictures() if kind == "vision" else [],
                "questions": questions(folder) if wanted.generates else [],
            }
        return self.targets[kind]


def run_script(client: Client, python: Path, script: str, servers: Servers) -> list[Row]:
    """Run a program of checks with the interpreter of its client."""
    setting, rows = servers.folder / "setting.json", servers.folder / "rows.jsonl"
    setting.write_text(json.dumps({kind: servers.target(kind) for kind in client.servers}))
    rows.unlink(missing_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    log = LOGS / f"{Path(script).stem}.log"
    reason = f"the program ended before, see {log}"
    with log.open("wb") as sink:
        try:
            subprocess.run(
                [python, CHECKS / script, setting, rows],
                env=environment | ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT,
                timeout=CLIENT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            reason = f"the program was not done after {CLIENT_S:.0f} s, see {log}"
    return rows_of_output(client.name, rows.read_text().splitlines() if rows.exists() else [], reason)


def rows_of_client(client: Client, servers: Servers) -> Iterator[Row]:
    """The rows of a client; a skipped one if it is not here."""
    try:
        python = interpreter_of(client)
    except MissingError as error:
        yield Row(client.name, "", "all", None, note=str(error))
        return
    for script in client.scripts:
        yield from run_script(client, python, script, servers)


def main() -> int:
    try:
        clients = selected(os.environ.get("CLIENTS", ""))
    except ValueError as error:
        print(f"make interop: {error}", file=sys.stderr)
        return 2
    shutil.rmtree(LOGS, ignore_errors=True)
    LOGS.mkdir(parents=True)
    rows: list[Row] = []
    with ExitStack() as stack:
        servers = Servers(stack)
        for client in clients:
            found = list(rows_of_client(client, servers))
            passed = sum(row.passed is True for row in found)
            print(f"make interop: {client.name}: {passed} of {len(found)} passed", file=sys.stderr, flush=True)
            rows += found
            write_rows(RESULTS, rows)
    Console(width=None if sys.stdout.isatty() else 180).print(terminal_table(rows))
    if os.environ.get("STORE") == "1":
        page.store(rows)
    failed = [row for row in rows if row.passed is False]
    for row in failed:
        print(f"FAILED: {row.client}, {row.feature}: {row.note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
