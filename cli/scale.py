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
    "--drain-timeout",
    type=Finite(0),
    metavar="SECONDS",
    default_text="none",
    help="Longest time that surplus replicas get for the requests that they have. Those without output move to other "
    "replicas then, and the others end with an error.",
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
    url: str,
    replicas: int,
    drain_timeout: float | None,
    wait: bool,
    timeout: float | None,
    api_key: str | None,
    ca: str | None,
    insecure: bool,
) -> int:
    """Change the number of replicas of the server at URL while it serves.

    New replicas are started. Surplus ones are drained: they get no new requests, and end when their last one is done.
    No request is lost, unless --drain-timeout ends some.
    """
    if insecure and ca is not None:
        raise click.UsageError("use --ca or --insecure, not both")
    target = Target(url, "", api_key, (), ca, insecure)
    url = target.base_url  # without a password
    with ControlClient(target, timeout_s=REQUEST_S) as server:
        state = begun = _answer(server, url, {"data_parallel_size": replicas, "drain_timeout": drain_timeout})
        if wait:
            state = _wait_or_leave(server, url, state, timeout)
    if state["error"]:
        raise BenchError(state["error"])
    if ended := state["timed_out"] - begun["timed_out"]:
        click.echo(f"{ended} output{'s' if ended > 1 else ''} ended with an error (--drain-timeout)", err=True)
    serving = _count(state, "ok", "hung")
    if wait and serving < replicas:
        click.echo(f"{serving} of {replicas} replicas serve; see {url}/health", err=True)
        return FAILED
    click.echo(f"{serving} replica{'' if serving == 1 else 's'} serve{'s' if serving == 1 else ''}")
    return 0


def _wait_or_leave(server: ControlClient, url: str, state: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """Poll until the change is done; Ctrl-C ends the command alone, not the change."""
    try:
        return _wait(server, url, state, timeout)
    except KeyboardInterrupt:
        again = f"redline scale {url} --dp {state['data_parallel_size']}"
        click.echo(f"the change goes on; to wait for it again: {again}", err=True)
        raise


def _wait(server: ControlClient, url: str, state: dict[str, Any], timeout: float | None) -> dict[str, Any]:
    """Poll until the change is done; shows each step of it."""
    revision, wanted, shown = state["revision"], state["data_parallel_size"], ""
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        # A process that does not know of this change yet may answer.
        if state["revision"] >= revision:
            if (now := _summary(state)) != shown:
                click.echo(now, err=True)
                shown = now
            if state["error"]:
                return state
            if state["data_parallel_size"] != wanted:
                raise BenchError(f"another command has changed the number of replicas: {now}")
            if state["done"]:
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


def _answer(server: ControlClient, url: str, change: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state of the change; with `change`, begin one. Raises BenchError if the server refuses."""
    try:
        answer = server.get("/scale") if change is None else server.post("/scale", change)
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
