"""An HTTP server with a known schedule, run as a process of its own: known_server.py LOG [CERTIFICATE KEY].

The request's `model` is a plan in JSON (see PLAN); `max_tokens` says how many tokens to stream and names the request in
the log, to which one JSON line a request is written: when it came and when each chunk truly left.
"""

import json
import socket
import ssl
import sys
import threading
import time
from typing import Any

PLAN: dict[str, Any] = {
    "ttft": 0.0,  # seconds
    "itl": 0.0,
    "per_chunk": 1,  # tokens a chunk
    "logprobs": False,  # chunks say their tokens
    "stall_after": None,  # chunks before a stall of stall_s
    "stall_s": 0.0,
    "split": False,  # every event leaves in two pieces
    "framing": "chunked",  # or "length", "close"
    "status": 200,
    "fault": None,  # "close", "garbage event", "garbage chunk", "garbage head", "error event", "hang", "no end"
    "fault_after": 0,  # chunks before the fault
}


def main() -> None:
    log = open(sys.argv[1], "a")  # noqa: SIM115  # lives as long as the process
    lock = threading.Lock()
    context = None
    if len(sys.argv) > 2:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(sys.argv[2], sys.argv[3])
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock, context, log, lock), daemon=True).start()


def serve(sock: socket.socket, context: ssl.SSLContext | None, log: Any, lock: threading.Lock) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        if context:
            sock = context.wrap_socket(sock, server_side=True)
        request = read_request(sock)
        if request is None:
            return
        headers, body, received_ns = request
        entry = {"max_tokens": body["max_tokens"], "received_ns": received_ns, "headers": headers, "body": body}
        entry["chunks_ns"] = sent = []
        try:
            answer(sock, PLAN | json.loads(body["model"]), body, sent)
        except OSError as error:
            entry["client_gone"] = str(error)
        with lock:
            log.write(json.dumps(entry) + "\n")
            log.flush()
    finally:
        sock.close()


def read_request(sock: socket.socket) -> tuple[str, dict[str, Any], int] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = sock.recv(65536)
        if not piece:
            return None
        data += piece
    received_ns = time.time_ns()
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += sock.recv(65536)
    return head.decode(), json.loads(body), received_ns


def answer(sock: socket.socket, plan: dict[str, Any], body: dict[str, Any], sent: list[int]) -> None:
    if plan["status"] != 200:
        text = json.dumps({"error": {"message": "the stub says no", "code": plan["status"]}}).encode()
        sock.sendall(b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n" % (plan["status"], len(text)) + text)
        return
    if plan["fault"] == "garbage head":
        sock.sendall(b"SSH-2.0-stub\r\n")
        return
    events = make_events(plan, body)
    framing = {
        "chunked": b"Transfer-Encoding: chunked\r\n",
        "length": b"Content-Length: %d\r\n" % sum(map(len, events)),
        "close": b"",
    }[plan["framing"]]
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framing + b"\r\n")
    for number, event in enumerate(events):
        due = plan["ttft"] if number == 0 else plan["itl"]
        if number == plan["stall_after"]:
            due = plan["stall_s"]
        if due and number < len(events) - 2:  # usage and [DONE] follow at once
            time.sleep(due)
        if plan["fault"] and plan["fault"] != "no end" and number == plan["fault_after"]:
            misbehave(sock, plan["fault"])
            return
        frame = b"%x\r\n%s\r\n" % (len(event), event) if plan["framing"] == "chunked" else event
        if plan["split"]:
            sock.sendall(frame[: len(frame) // 2])
            time.sleep(0.002)
            frame = frame[len(frame) // 2 :]
        sent.append(time.time_ns())
        sock.sendall(frame)
    if plan["fault"] == "no end":
        wait_for_client(sock)
    elif plan["framing"] == "chunked":
        sock.sendall(b"0\r\n\r\n")


def make_events(plan: dict[str, Any], body: dict[str, Any]) -> list[bytes]:
    total, step = body["max_tokens"], plan["per_chunk"]
    messages: list[dict[str, Any]] = []
    for start in range(0, total, step):
        count = min(step, total - start)
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length" if start + count >= total else None}
        text = "word " * count
        choice |= {"delta": {"content": text}} if "messages" in body else {"text": text}
        if plan["logprobs"]:
            choice["logprobs"] = {"tokens": ["word "] * count}
        messages.append({"choices": [choice]})
    prompt = len(body.get("prompt", body.get("messages")))
    details = {"cached_tokens": 3}
    usage = {"prompt_tokens": prompt, "completion_tokens": total, "prompt_tokens_details": details}
    messages.append({"choices": [], "usage": usage})
    return [b"data: " + json.dumps(m).encode() + b"\n\n" for m in messages] + [b"data: [DONE]\n\n"]


def misbehave(sock: socket.socket, fault: str) -> None:
    if fault == "garbage event":
        event = b"data: {not json\n\n"
        sock.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event))
    elif fault == "error event":
        event = b'data: {"error": {"message": "the engine died"}}\n\n'
        sock.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event))
    elif fault == "garbage chunk":
        sock.sendall(b"zz\r\nwhat\r\n")
    elif fault == "hang":
        wait_for_client(sock)
    else:
        assert fault == "close", fault


def wait_for_client(sock: socket.socket) -> None:
    sock.settimeout(60)
    sock.recv(1)


if __name__ == "__main__":
    main()
