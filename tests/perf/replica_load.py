"""Steady load on a server whose replicas come and go, and what a server has left behind once it has ended."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

REQUEST_LIMIT_S = 300.0
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "it",
    "was",
    "for",
    "on",
    "are",
    "as",
    "with",
    "his",
    "they",
    "at",
)


@dataclass
class Asked:
    """One request, with times on the monotonic clock."""

    begin: float
    end: float
    tokens: int  # that came
    error: str  # empty: it was answered in full


@dataclass
class Kill:
    """A replica that was ended by SIGKILL."""

    at: float
    replica: int
    process: int


@dataclass
class Load:
    """Clients that each ask one request after the other, each over a connection of its own."""

    url: str
    tokens: int  # most of an output
    asked: list[Asked] = field(default_factory=list)
    _ended: bool = False

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self._client(random.Random(number)) for number in range(clients)))

    def stop(self) -> None:
        """Begin no more requests."""
        self._ended = True

    async def _client(self, draw: random.Random) -> None:
        while not self._ended:
            begin, tokens, error = time.monotonic(), 0, ""
            wanted = draw.randint(self.tokens // 4, self.tokens)
            body = {
                "prompt": " ".join(draw.choices(WORDS, k=draw.randint(4, 60))), "max_tokens": wanted, "temperature": 0,
                "ignore_eos": True, "stream": True, "return_token_ids": True,
            }  # fmt: skip
            try:
                tokens, error = await self._stream(body)
            except httpx.HTTPError as caught:
                error = f"{type(caught).__name__}: {caught}"
            if not error and tokens != wanted:
                error = f"{tokens} of {wanted} tokens came"
            self.asked.append(Asked(begin, time.monotonic(), tokens, error))

    async def _stream(self, body: dict[str, Any]) -> tuple[int, str]:
        """The tokens that came, and the error if the answer was not whole."""
        tokens, last = 0, ""
        async with (
            httpx.AsyncClient(timeout=REQUEST_LIMIT_S) as http,
            http.stream("POST", f"{self.url}/v1/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                return 0, f"HTTP {answer.status_code}: {(await answer.aread()).decode()}"
            async for line in answer.aiter_lines():
                last = line or last
                if line.startswith("data: {"):
                    event = msgspec.json.decode(line.removeprefix("data: "))
                    if "error" in event:
                        return tokens, str(event["error"]["message"])
                    tokens += sum(len(choice["token_ids"]) for choice in event["choices"])
        return tokens, "" if last == "data: [DONE]" else f"the stream broke off after {last!r}"


def serving(health: dict[str, Any]) -> list[dict[str, Any]]:
    """The replicas that serve, of the body of /health."""
    return [one for one in health.get("replicas", ()) if one["status"] == "ok"]


async def kill_replicas(
    read_health: Callable[[], dict[str, Any]], period_s: float, count: int, draw: random.Random
) -> list[Kill]:
    """Kill a replica that serves, in each period; waits for one if none does."""
    kills: list[Kill] = []
    while len(kills) < count:
        await asyncio.sleep(period_s)
        while not (up := serving(await asyncio.to_thread(read_health))):
            await asyncio.sleep(0.1)
        one = draw.choice(up)
        with contextlib.suppress(ProcessLookupError):
            os.kill(one["process"], 9)
            kills.append(Kill(time.monotonic(), one["replica"], one["process"]))
    return kills


def unexplained(asked: Iterable[Asked], kills: Iterable[Kill]) -> list[str]:
    """The errors of requests that were not running on a replica while it was killed."""
    found = []
    for one in asked:
        running = (f"(process {kill.process}) was killed" for kill in kills if one.begin < kill.at < one.end)
        if one.error and not any(cause in one.error for cause in running):
            found.append(one.error)
    return found


def traces(folder: Path) -> set[str]:
    """Sockets in a folder, and what lies in shared memory."""
    sockets = {str(path) for path in folder.rglob("*") if path.is_socket() or path.name.startswith("redline-")}
    return sockets | {str(path) for path in Path("/dev/shm").iterdir()}


class Family:
    """All processes that a server ever had."""

    def __init__(self, server: int):
        self._server = psutil.Process(server)
        self._seen: set[psutil.Process] = set()

    def look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self._seen.update([self._server, *self._server.children(recursive=True)])

    @property
    def descriptors(self) -> int:
        """Of the process that was started."""
        return int(self._server.num_fds())

    def left(self) -> list[str]:
        """Those that still run, some seconds after the server's end."""
        _, alive = psutil.wait_procs(list(self._seen), timeout=10)
        return [f"process {one.pid} ({' '.join(one.cmdline())})" for one in alive]
