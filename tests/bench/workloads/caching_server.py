"""A server with a prefix cache that never forgets, which takes text, token ids and pictures, and records what it got.

Speaks enough of the OpenAI protocol for the benchmark, and /tokenize: a token is a word. One line of JSON a request
goes to --record.
"""

import argparse
import base64
import hashlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

BLOCK = 16
PICTURE_TOKENS = 32
WORDS = 30_000


def word_ids(text: str) -> list[int]:
    return [
        int.from_bytes(hashlib.blake2b(word.encode(), digest_size=4).digest(), "big") % WORDS for word in text.split()
    ]


class Cache:
    def __init__(self, record: str):
        self.record = record
        self.lock = threading.Lock()
        self.known: set[tuple[int, ...]] = set()
        self.queries = 0
        self.hits = 0
        self.running = 0

    def count(self, change: int) -> None:
        with self.lock:
            self.running += change

    def add(self, ids: list[int], row: dict) -> None:
        with self.lock:
            self.queries += len(ids)
            ends = range(BLOCK, len(ids) + 1, BLOCK)
            self.hits += BLOCK * sum(tuple(ids[:end]) in self.known for end in ends)
            self.known.update(tuple(ids[:end]) for end in ends)
            with open(self.record, "a") as f:
                f.write(json.dumps(row) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cache: Cache
    vocabulary = True

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            card = {"id": "stub", "owned_by": "stub", "max_model_len": 4096}
            self.whole({"data": [card | ({"vocab_size": WORDS} if self.vocabulary else {})]})
        elif self.path == "/metrics":
            counters = {"prefix_cache_queries_total": self.cache.queries, "prefix_cache_hits_total": self.cache.hits}
            gauges = {"num_requests_running": self.cache.running, "num_requests_waiting": 0, "num_preemptions_total": 0}
            self.whole("".join(f"vllm:{name} {value}\n" for name, value in (counters | gauges).items()))
        else:
            self.whole("ok")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        asked = json.loads(body)
        if self.path == "/tokenize":
            self.whole({"tokens": word_ids(asked["prompt"])})
            return
        self.cache.count(1)
        try:
            self.complete(asked, body)
        finally:
            self.cache.count(-1)

    def complete(self, asked: dict, body: bytes) -> None:
        pictures: list[dict] = []
        ids = self.read(asked, pictures)
        row = {"path": self.path, "sha": hashlib.sha256(body).hexdigest(), "tokens": len(ids), "pictures": pictures}
        self.cache.add(ids, row | {"max_tokens": asked["max_tokens"]})
        self.stream(len(ids), asked["max_tokens"], chat="messages" in asked)

    def read(self, asked: dict, pictures: list[dict]) -> list[int]:
        if "prompt" in asked:
            return asked["prompt"] if isinstance(asked["prompt"], list) else word_ids(asked["prompt"])
        ids: list[int] = []
        for message in asked["messages"]:
            content = message["content"]
            ids += word_ids(message["role"])
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    ids += word_ids(part["text"])
                else:
                    sha = self.picture(part["image_url"]["url"], pictures)
                    ids += [int(sha[:8], 16)] * PICTURE_TOKENS
        return ids

    def picture(self, url: str, pictures: list[dict]) -> str:
        head, _, content = url.partition(";base64,")
        image = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
        sha = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        pictures.append({"sha": sha, "type": head, "format": image.format, "size": image.size})
        return sha

    def stream(self, inputs: int, outputs: int, chat: bool) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        said = {"delta": {"content": "a"}} if chat else {"text": "a"}
        events = [{"choices": [{"index": 0, "finish_reason": None} | said]}] * outputs
        events.append({"choices": [], "usage": {"prompt_tokens": inputs, "completion_tokens": outputs}})
        for event in [*(json.dumps(event) for event in events), "[DONE]"]:
            line = f"data: {event}\n\n".encode()
            self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def whole(self, answer: object) -> None:
        content = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--record", required=True)
    parser.add_argument("--no-vocabulary", dest="vocabulary", action="store_false")
    options = parser.parse_args()
    Handler.cache, Handler.vocabulary = Cache(options.record), options.vocabulary
    try:
        ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
    except KeyboardInterrupt:
        print("interrupted")


if __name__ == "__main__":
    main()
