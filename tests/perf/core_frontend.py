"""The front end under measurement, for `make bench-core`: detokenising, SSE rendering, and the whole of it.

The core is played back: its messages are made ahead, and only what the front end's thread does with them counts.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from engine.api.app import create_app
from engine.api.http_server import UvicornServer, uvicorn_config
from engine.api.render import Chunks, new_head
from engine.api.state import ApiState
from engine.clock import MonotonicClock
from engine.columns import column
from engine.frontend.core_client import CoreClient
from engine.frontend.detokenizer import Detokenizer
from engine.frontend.sampling_params import SamplingParams
from engine.frontend.streams import Delta, Origin, RequestStream
from engine.frontend.tokenizer import Tokenizer
from engine.frontend.tokenizer_backends import FastBackend
from engine.frontend.transport import LocalFiles
from engine.messages import AddRequest, Finished, FinishReason, Outputs, Ready, ToCore, encode
from engine.stats import Stats
from tests.perf.child_processes import start_child

ROOT = Path(__file__).parents[2]
WARM_UP_STEPS = 20
MODEL = "bench"
BODY = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 1000, "stream": True}

thread_ns = time.thread_time_ns


def make_text() -> str:
    """Text that every checkout has, with characters of more than one byte in it."""
    return (ROOT / "README.md").read_text() + (ROOT / "ARCHITECTURE.md").read_text()


def make_tokenizer(text: str) -> Tokenizer:
    """A byte-level tokenizer, as most models have, of a size that suffices here."""
    library = LibraryTokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([text], trainer)
    return Tokenizer(FastBackend(library))


class _Nobody:
    def __init__(self) -> None:
        self.touched: list[RequestStream] = []

    def abort(self, stream: RequestStream) -> None:
        raise AssertionError("nothing is aborted here")


def detokenise_sse_us(repeats: int = 200) -> float:
    """Median µs to turn a token into the bytes of its event, over batches of 256 tokens."""
    text = make_text()
    tokenizer = make_tokenizer(text)
    ids = tokenizer.encode(text)[:8192]
    stream = RequestStream([[1]], SamplingParams(), _Nobody(), 0.0, Origin())
    detokenizer = Detokenizer(tokenizer)
    chunks = Chunks(stream, tokenizer, new_head("chatcmpl", "chat.completion.chunk", MODEL), chat=True)
    samples = []
    at = 0
    for number in range(repeats + len(ids) // 256):
        batch = ids[at : at + 256]
        at = (at + 256) % (len(ids) - 256)
        begin = thread_ns()
        for token in batch:
            shown, _ = detokenizer.push(token)
            chunks.render(Delta(0, shown, [token]))
        if number >= len(ids) // 256:  # until then pieces are met for the first time
            samples.append((thread_ns() - begin) / len(batch))
    return float(np.median(samples)) / 1e3


class PlayedCore(LocalFiles):
    """A transport whose core is the measurement: it notes requests and delivers what it is given."""

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.deliver: Callable[[bytes], None] = lambda data: None

    def open(self, deliver: Callable[[bytes], None]) -> None:
        self.deliver = deliver

    def send(self, message: ToCore) -> None:
        if isinstance(message, AddRequest):
            self.handles.append(message.handle)

    def close(self) -> None:
        self.handles.clear()

    def messages(self, ids: list[int], steps: int) -> list[bytes]:
        """What the core would send: each step one token for every request."""
        handles = column(self.handles, "<i8")
        random = np.random.default_rng(3)
        found = []
        for step in range(steps):
            begin = int(random.integers(0, len(ids) - len(self.handles)))
            tokens = column(ids[begin : begin + len(self.handles)])
            found.append(encode(Outputs(at=step * 0.05, handles=handles, tokens=tokens, stats=Stats(steps=step))))
        return found


class FrontEnd:
    """The real client and application around a core that is played back."""

    def __init__(self) -> None:
        text = make_text()
        tokenizer = make_tokenizer(text)
        self.ids = tokenizer.encode(text)
        ready = Ready("", "none", "none", tokenizer.vocab_size, 4096, 1024, 2048, 16, 65536, True)
        self.core = PlayedCore()
        self.client = CoreClient(ready, tokenizer, self.core, MonotonicClock())
        self.client.open()
        self.app = create_app(ApiState(self.client, (MODEL,), created=1))


async def _in_process(streams: int, steps: int) -> float:
    front_end = FrontEnd()
    body = json.dumps(BODY).encode()
    sent = 0

    async def send(event: Any) -> None:
        nonlocal sent
        sent += event["type"] == "http.response.body"

    async def one() -> None:
        asked = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            return asked.pop() if asked else await asyncio.Future()

        headers = [(b"content-type", b"application/json"), (b"host", b"bench")]
        path = "/v1/completions"
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": headers, "http_version": "1.1", "asgi": {"version": "3.0"}, "scheme": "http"}
        scope |= {"root_path": "", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}
        await front_end.app(scope, receive, send)

    tasks = [asyncio.ensure_future(one()) for _ in range(streams)]
    while len(front_end.core.handles) < streams:
        await asyncio.sleep(0)
    samples = []
    for number, message in enumerate(front_end.core.messages(front_end.ids, steps + WARM_UP_STEPS)):
        target = sent + streams
        begin = thread_ns()
        front_end.core.deliver(message)
        while sent < target:
            await asyncio.sleep(0)
        if number >= WARM_UP_STEPS:
            samples.append((thread_ns() - begin) / streams)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return float(np.mean(samples)) / 1e3


def in_process_us(streams: int, steps: int = 200) -> float:
    """Mean CPU µs of a streamed token, from the core's message to the application's `send`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_in_process(streams, steps))


# Opens so many streams and reads them to their end: a client that costs the server's thread nothing.
READER = """
import selectors, socket, sys
port, streams, body = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
selector = selectors.DefaultSelector()
for _ in range(streams):
    connection = socket.create_connection(("127.0.0.1", port))
    head = b"POST /v1/completions HTTP/1.1\\r\\nHost: bench\\r\\nContent-Type: application/json\\r\\n"
    connection.sendall(head + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
    selector.register(connection, selectors.EVENT_READ)
while selector.get_map():
    for key, _ in selector.select():
        if not key.fileobj.recv(1 << 16):
            selector.unregister(key.fileobj)
"""


async def _over_sockets(streams: int, steps: int, pause_s: float) -> tuple[float, float]:
    front_end = FrontEnd()
    settings = uvicorn_config(front_end.app, host="127.0.0.1", port=0)
    server = UvicornServer(settings)
    serving = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    reader = start_child([sys.executable, "-c", READER, str(port), str(streams), json.dumps(BODY)])
    try:
        while len(front_end.core.handles) < streams:
            await asyncio.sleep(0.01)
        before = resource.getrusage(resource.RUSAGE_THREAD)
        for number, message in enumerate(front_end.core.messages(front_end.ids, steps + WARM_UP_STEPS)):
            if number == WARM_UP_STEPS:
                before = resource.getrusage(resource.RUSAGE_THREAD)
            front_end.core.deliver(message)
            await asyncio.sleep(pause_s)
        after = resource.getrusage(resource.RUSAGE_THREAD)
        finished = tuple(Finished(handle, FinishReason.LENGTH) for handle in front_end.core.handles)
        front_end.core.deliver(encode(Outputs(at=0.0, finished=finished)))
        await asyncio.sleep(pause_s)
    finally:
        reader.kill()
        reader.wait()
        server.finish()
        await serving
    tokens = streams * steps
    system = (after.ru_stime - before.ru_stime) * 1e6 / tokens
    return (after.ru_utime - before.ru_utime) * 1e6 / tokens + system, system


def over_sockets_us(streams: int, steps: int = 200, pause_s: float = 0.03) -> tuple[float, float]:
    """The same with the HTTP server and as many connections written to; and of that the kernel's part."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_over_sockets(streams, steps, pause_s))
