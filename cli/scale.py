"""`redline scale`: add replicas to a running server, or drain some."""

import time
from typing import Any

import click
import httpx

from bench.errors import BenchError
from bench.target import Target
from bench.target.control import ControlClient, reason_of
from cli.exit_codes import FAILED
from cli.options import Finite, GroupedCommand, option
from engine.frontend.front_end_stats import MOST_REPLICAS

POLL_S = 0.5
REQUEST_S = 15.0
TARGET, CHANGE = "Server", "Change"


@click.command(cls=GroupedCommand)
@click.argument("url")
@option(
    CHANGE,
    "-dp",
    "--dp",
    "--data-parallel-size",
    "replicas",
    type=click.IntRange(1, MOST_REPLICAS),
    required=True,
    metavar="N",
    help="Number of replicas that the server shall have.",
)
@option(
    CHANGE,
    "--wait/--no-wait",
    default=True,
    help="Wait until new replicas serve and surplus ones are drained.",
)
@option(
    CHANGE,
    "--timeout",
    type=Finite(0, min_open=True),
    metavar="SECONDS",
    default_text="none",
    help="Longest time to wait; the change goes on after it.",
)
@option(TARGET, "--api-key", envvar="REDLINE_API_KEY", metavar="KEY", help="API key to send as a bearer token.")
@option(
    TARGET,
    "--ca",
    metavar="PATH",
    default_text="the system's",
    help="CA certificates to trust, as a PEM file or a folder. Set it for a server with a private certificate "
    "authority.",
)
@option(TARGET, "--insecure", is_flag=True, help="Skip the verification of the server's TLS certificate.")
def command(
    url: str, replicas: int, wait: bool, timeout: float | None, api_key: str | None, ca: str | None, insecure: bool
) -> int:
    """Change the number of replicas of the server at URL while it serves.

    New replicas are started. Surplus ones are drained: they get no new requests, and end when their last one is done.
    No request is lost.
    """
    if insecure and ca is not None:
        raise click.UsageError("use --ca or --insecure, not both")
    target = Target(url, "", api_key, (), ca, insecure)
    url = target.base_url  # without a password
    with ControlClient(target, timeout_s=REQUEST_S) as server:
        state = _answer(server, url, replicas)
        if wait:
            state = _wait(server, url, state, timeout)
    if state["error"]:
        raise BenchError(state["error"])
    serving = _count(state, "ok", "hung")
    if wait and serving < replicas:
        click.echo(f"{serving} of {replicas} replicas serve; see {url}/health", err=True)
        return FAILED
    click.echo(f"{serving} replica{'' if serving == 1 else 's'} serve{'s' if serving == 1 else ''}")
    return 0


def _wait(server: ControlClient, url: str, state: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """Poll until the change is done; shows each step of it."""
    revision, shown = state["revision"], ""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        # A process that does not know of this change yet may answer.
        if state["revision"] >= revision:
            if (now := _summary(state)) != shown:
                click.echo(now, err=True)
                shown = now
            if state["done"] or state["error"]:
                return state
        if deadline is not None and time.monotonic() > deadline:
            raise BenchError(f"not done within {timeout:g} s: {shown}; the change goes on")
        time.sleep(POLL_S)
        state = _answer(server, url)


def _summary(state: dict[str, Any]) -> str:
    statuses = sorted({replica["status"] for replica in state["replicas"]})
    counts = ", ".join(f"{_count(state, status)} {status}" for status in statuses)
    return f"replicas: {state['data_parallel_size']} wanted; {counts}"


def _count(state: dict[str, Any], *statuses: str) -> int:
    return sum(replica["status"] in statuses for replica in state["replicas"])


def _answer(server: ControlClient, url: str, replicas: int | None = None) -> dict[str, Any]:
    """The state of the change; with `replicas`, begin one. Raises BenchError if the server refuses."""
    try:
        answer = server.get("/scale") if replicas is None else server.post("/scale", {"data_parallel_size": replicas})
    except httpx.HTTPError as error:
        raise BenchError(f"{url} does not answer: {reason_of(error)}") from error
    if answer.status_code != 200:
        raise BenchError(f"{url} refused: {_message(answer)}")
    state: dict[str, Any] = answer.json()
    return state


def _message(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {answer.status_code}"
