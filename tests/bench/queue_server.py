"""A server with a sharp known capacity: SLOTS requests at a time, SERVICE seconds each, first come first served.

Speaks enough of the OpenAI protocol for the benchmark: /v1/models, /v1/completions (streamed), /health, /metrics.
"""

import argparse
import asyncio
import json

VOCABULARY = 1000
MODEL_LEN = 4096


class QueueServer:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        # When each slot is free, first come first served: a service starts when the one before it was due to end, not
        # when the loop came round to it, so that the capacity is exact.
        self.slots: asyncio.PriorityQueue[float] = asyncio.PriorityQueue()
        for _ in range(options.slots):
            self.slots.put_nowait(0.0)
        self.running = 0
        self.waiting = 0
        self.preemptions = 0
        self.answered = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split("\r\n")[0].split(" ")
                fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                await self.answer(method, path, body, writer)
                if fields.get("connection") == "close":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if path == "/health":
            await self.whole(writer, 200, b"ok")
        elif path == "/metrics" and self.options.metrics:
            await self.whole(writer, 200, self.metrics().encode())
        elif path == "/v1/models":
            card = {"id": "stub", "object": "model", "owned_by": "stub", "max_model_len": MODEL_LEN}
            card |= {"vocab_size": VOCABULARY} if self.options.vocabulary else {}
            await self.whole(writer, 200, json.dumps({"data": [card]}).encode())
        elif path == "/v1/completions" and method == "POST":
            await self.completion(json.loads(body), writer)
        else:
            await self.whole(writer, 404, b'{"error": {"message": "no such page"}}')

    async def whole(self, writer: asyncio.StreamWriter, status: int, content: bytes) -> None:
        head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        await writer.drain()

    async def completion(self, request: dict, writer: asyncio.StreamWriter) -> None:
        self.answered += 1
        if self.options.fail_from and self.answered >= self.options.fail_from:
            await self.whole(writer, 429, b'{"error": {"message": "too many requests"}}')
            return
        if self.options.exit_from and self.answered >= self.options.exit_from:
            raise SystemExit(3)
        fault = self.options.faults.get(self.answered, "")
        if fault.isdigit():
            await self.whole(writer, int(fault), b'{"error": {"message": "asked to fail"}}')
            return
        self.waiting += 1
        arrived = asyncio.get_running_loop().time()
        begin = max(arrived, await self.slots.get())
        self.waiting -= 1
        self.running += 1
        if self.options.preempt_above and self.running > self.options.preempt_above:
            self.preemptions += 1
        free_at = 0.0  # at once, where the client left
        try:
            await self.stream(request, writer, begin, fault)
            free_at = begin + self.options.service
        finally:
            self.running -= 1
            self.slots.put_nowait(free_at)

    async def stream(self, request: dict, writer: asyncio.StreamWriter, begin: float, fault: str) -> None:
        asked = request["max_tokens"]
        tokens = asked if not self.options.short else max(1, asked // 2)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for i in range(tokens):
            if fault == "malformed":
                self.chunk(writer, b"data: {not json\n\n")
            elif fault == "cut":
                raise ConnectionError
            due = begin + self.options.service * (i + 1) / tokens
            await asyncio.sleep(due - asyncio.get_running_loop().time())
            self.event(writer, {"choices": [{"index": 0, "text": "a", "finish_reason": None}]})
            await writer.drain()
        usage = {"prompt_tokens": len(request["prompt"]), "completion_tokens": tokens}
        self.event(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        self.event(writer, {"choices": [], "usage": usage})
        self.chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def event(self, writer: asyncio.StreamWriter, content: dict) -> None:
        self.chunk(writer, b"data: " + json.dumps(content).encode() + b"\n\n")

    def chunk(self, writer: asyncio.StreamWriter, content: bytes) -> None:
        writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def metrics(self) -> str:
        inside = self.running + self.waiting  # a slot on its way from one request to the next counts as taken
        running = min(inside, self.options.slots)
        values = {
            "vllm:num_requests_running": running,
            "vllm:num_requests_waiting": inside - running,
            "vllm:kv_cache_usage_perc": running / (2 * self.options.slots),
            "vllm:num_preemptions_total": self.preemptions,
        }
        return "".join(f'{name}{{model_name="stub",engine="0"}} {value}\n' for name, value in values.items())


async def serve(options: argparse.Namespace) -> None:
    if options.refuse:
        raise SystemExit(f"stub: error: {options.refuse}")
    server = await asyncio.start_server(QueueServer(options).connection, "127.0.0.1", options.port, backlog=1024)
    async with server:
        await server.serve_forever()


def faults(text: str) -> dict[int, str]:
    return {int(number): kind for number, _, kind in (part.partition("=") for part in text.split(","))}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--service", type=float, default=0.1, help="seconds")
    parser.add_argument("--no-metrics", dest="metrics", action="store_false")
    parser.add_argument("--no-vocabulary", dest="vocabulary", action="store_false")
    parser.add_argument("--preempt-above", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="half of the tokens asked")
    parser.add_argument("--fail-from", type=int, default=0, help="HTTP 429 from this request on")
    parser.add_argument("--exit-from", type=int, default=0, help="exit at this request")
    parser.add_argument(
        "--faults", type=faults, default={}, help="by request: 3=500,5=malformed,7=cut (HTTP status, SSE, connection)"
    )
    parser.add_argument("--refuse", default="", help="print this and exit at once")
    try:
        asyncio.run(serve(parser.parse_args()))
    except KeyboardInterrupt:
        print("interrupted")


if __name__ == "__main__":
    main()
