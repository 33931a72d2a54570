"""The loads of bench_mm_stall.py: requests with pictures, and a process that decodes the same pictures by itself."""

import asyncio
import base64
import itertools
import json
import multiprocessing
import os
import struct
import sys
import threading
import time
import zlib
from multiprocessing.sharedctypes import Synchronized
from types import TracebackType
from typing import Any, Self

import httpx

from bench.workloads.images import SyntheticImages
from tests.perf.child_processes import end_with_parent

SIZE = 1275, 1650
DIFFERENT = 8  # pictures that are encoded; each one that is sent also has bytes of its own
START_LIMIT_S = 120.0
BUSY_AFTER = 2  # pictures
JSON = {"content-type": "application/json"}
_END = 12  # bytes of the last chunk of a PNG


def pictures(size: tuple[int, int], count: int = DIFFERENT) -> list[bytes]:
    """Different PNG pictures of a size."""
    workload = SyntheticImages(images=1, image_size=f"{size[0]}x{size[1]}", input=1, output=1, image_format="png")
    urls = [spec.messages[0]["content"][0]["image_url"]["url"] for spec in workload.requests(count, 0)]  # type: ignore[index]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def salted(png: bytes, salt: str) -> bytes:
    """The same picture in other bytes, so that no cache knows it: with a comment before the last chunk."""
    content = b"tEXtComment\0" + salt.encode()
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    return png[:-_END] + chunk + png[-_END:]


class NoLoad:
    """What all loads have: used as a context, during which they run."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def done(self) -> int:
        """Pictures so far."""
        return BUSY_AFTER

    def wait_until_busy(self) -> None:
        """Return once the first pictures are done; ends the program if they never are."""
        end = time.monotonic() + START_LIMIT_S
        while self.done() < BUSY_AFTER:
            if time.monotonic() > end:
                sys.exit(f"no picture was processed within {START_LIMIT_S:g} s")
            time.sleep(0.05)

    def progress(self) -> tuple[int, float]:
        """Pictures so far, and when that was."""
        return self.done(), time.monotonic()


class RequestLoad(NoLoad):
    """Keeps requests with one picture each open, each answered with one token.

    Args:
        url: of the server.
        given: PNG pictures.
        clients: requests that are open at any time.
        words: of the text behind the picture; so many that the prompt is too long, if `refused`.
    """

    def __init__(self, url: str, model: str, given: list[bytes], clients: int, words: int, *, refused: bool):
        self._url, self._model, self._given, self._clients = url, model, given, clients
        self._text, self._expected = "red " * words, 400 if refused else 200
        self._numbers = itertools.count()
        self._done = 0
        self._stop = threading.Event()
        self._failure = ""
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="pictures")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure and error is None:
            sys.exit(f"a request with a picture failed: {self._failure}")

    def done(self) -> int:
        if self._failure:
            sys.exit(f"a request with a picture failed: {self._failure}")
        return self._done

    async def _run(self) -> None:
        async with httpx.AsyncClient(
            base_url=self._url, headers=JSON, timeout=START_LIMIT_S, trust_env=False
        ) as client:
            await asyncio.gather(*(self._keep_sending(client) for _ in range(self._clients)))

    async def _keep_sending(self, client: httpx.AsyncClient) -> None:
        while not self._stop.is_set() and not self._failure:
            try:
                answer = await client.post("/v1/chat/completions", content=self._body(next(self._numbers)))
            except httpx.HTTPError as error:
                self._failure = repr(error)
                return
            if answer.status_code != self._expected:
                self._failure = f"status {answer.status_code}: {answer.text[:300]}"
            self._done += 1

    def _body(self, number: int) -> bytes:
        png = salted(self._given[number % len(self._given)], f"{os.getpid()} {number}")
        url = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": self._text}]
        messages = [{"role": "user", "content": content}]
        return json.dumps({"model": self._model, "messages": messages, "max_tokens": 1, "temperature": 0}).encode()


class LoadBeside(NoLoad):
    """A process on a core that decodes pictures as the pool does, without a server.

    Args:
        given: PNG pictures.
    """

    def __init__(self, given: list[bytes], core: int):
        context = multiprocessing.get_context("spawn")
        self._count: Synchronized[int] = context.Value("q", 0)
        self._process = context.Process(target=_keep_decoding, args=(given, core, self._count), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()

    def done(self) -> int:
        return self._count.value


def _keep_decoding(given: list[bytes], core: int, count: Any) -> None:
    end_with_parent()
    from engine.media.images import decode_image
    from engine.media.limits import MediaLimits

    os.sched_setaffinity(0, {core})
    for png in itertools.cycle(given):
        decode_image(png, MediaLimits()).resize((64, 83))
        count.value += 1
