"""`redline serve` as a user meets it: real processes, random weights of a tiny model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import httpx
import openai
import psutil
import pytest
import torch

from tests.serving import Served, serve

DUMMY = ("--load-format", "dummy")
SECOND = "[/second] [red] :fire:"  # would mean styles and a picture to rich


@pytest.fixture(scope="module")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = (*DUMMY, "--served_model_name", "tiny", "--max-model-len", "1K", "--limit_mm_per_prompt", "image=4")
    with serve(tmp_path_factory.mktemp("log"), model, *flags) as running:
        yield running


@pytest.fixture(scope="module")
def second(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Another server, which the test of Ctrl-C ends."""
    with serve(tmp_path_factory.mktemp("second"), model, *DUMMY, "--served-model-name", SECOND) as running:
        yield running


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "serve", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("redline: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    for words in said:
        assert words in done.stderr


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def test_the_start_table_says_what_was_resolved(served: Served, model: str):
    end = time.monotonic() + 10
    listening = f"listening on {served.url}"
    while listening not in served.output().splitlines() and time.monotonic() < end:
        time.sleep(0.05)  # it answers a moment before it says so
    lines = served.output().splitlines()
    shown = "\n".join(lines)
    assert model in shown
    for words in ("cpu", "float32", "--kv-cache-memory-bytes", "1,024 tokens", "--max-num-seqs", "at once"):
        assert words in shown
    assert listening in lines
    assert "warning: " in shown, "the missing tokenizer"


def test_the_openai_client_over_a_socket(served: Served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)
    assert client.models.list().data[0].id == "tiny"
    whole = client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0)
    chunks = list(client.completions.create(model="tiny", prompt="hello", max_tokens=8, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    with pytest.raises(openai.BadRequestError, match="1024"):
        client.completions.create(model="tiny", prompt=[5] * 2000)


def test_the_same_seed_gives_the_same_tokens_and_another_others(served: Served):
    def tokens(seed: int) -> list[int]:
        body = {"prompt": "hello", "max_tokens": 20, "seed": seed, "ignore_eos": True, "return_token_ids": True}
        found: list[int] = served.post("/v1/completions", **body)["choices"][0]["token_ids"]
        return found

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_a_client_that_leaves_frees_its_row(served: Served):
    body = {"prompt": "hello", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    before = served.metric("vllm:request_success_total")
    with served.client.stream("POST", "/v1/completions", json=body) as answer:
        chunks = answer.iter_raw()  # kept: a collected iterator closes the connection
        next(chunks)
        assert served.metric("vllm:num_requests_running") == 1
    deadline = time.monotonic() + 20
    while served.metric("vllm:request_success_total") == before or served.metric("vllm:num_requests_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert served.metric("vllm:generation_tokens_total") < 1000


def test_a_port_in_use_is_found_before_the_model_loads(served: Served, model: str):
    port = served.url.rsplit(":", 1)[1]
    begin = time.process_time()
    assert_one_line(run(model, *DUMMY, "--port", port), 1, f"port {port}", "--port")
    assert time.process_time() - begin < 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_one_line(model: str):
    assert_one_line(run(model, *DUMMY, "--device", "cuda"), 2, "--device cuda: ", "use --device cpu")


def test_two_servers_at_once(served: Served, second: Served):
    body = {"prompt": "hello", "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    threads, texts = [], {}

    def ask(which: str, server: Served) -> None:
        texts[which] = server.post("/v1/completions", **body)["choices"][0]["text"]

    for which, server in (("first", served), ("second", second)):
        threads.append(threading.Thread(target=ask, args=(which, server)))
        threads[-1].start()
    for thread in threads:
        thread.join(60)
    assert texts["first"] == texts["second"] != "", "same seed, same random weights"
    assert second.client.get("/v1/models").json()["data"][0]["id"] == SECOND
    assert f"Redline serves {SECOND}" in second.output()


def test_ctrl_c_lets_requests_finish_and_leaves_no_process(second: Served):
    """After the others that need the server."""
    family = children(second.process)
    assert family
    body = {"prompt": "hello", "max_tokens": 100, "ignore_eos": True, "stream": True, "return_token_ids": True}
    with httpx.stream("POST", f"{second.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        for _ in range(2):  # as `timeout` does: to the process, then to its group
            second.process.send_signal(signal.SIGINT)
        *events, last = [first, *(line for line in lines if line)]
    assert last == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in events]
    assert sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks) == 100
    assert second.process.wait(30) == 0
    assert_gone(family)
    assert "finishing 1 running request" in second.output()


def test_a_killed_core_ends_the_server_with_its_cause(served: Served):
    """After the others that need the server."""
    [core] = children(served.process)
    body = {"prompt": "hello", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(core.pid, signal.SIGKILL)
        events = [line for line in lines if line]
    assert "SIGKILL" in json.loads(events[-1].removeprefix("data: "))["error"]["message"]
    assert served.process.wait(30) == 1
    last = served.output().splitlines()[-1]
    assert last.startswith("redline: error: the EngineCore")
    assert "SIGKILL" in last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_leaves_nothing(model: str, number: int):
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "serve", model, *DUMMY, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while not (family := children(process)):
            assert process.poll() is None
            time.sleep(0.02)
        for _ in range(2):  # as `timeout` does: to the process, then to its group
            os.kill(process.pid, number)
        assert process.wait(30) == 128 + number
        assert_gone(family)
    finally:
        process.kill()
        output, _ = process.communicate()
    assert b"Traceback" not in output


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("/no/such/model",), 1, ["/no/such/model"]),
        (("MODEL", "--kv-cache-memory-bytes", "1000"), 1, ["--kv-cache-memory-bytes"]),
        (("MODEL", "--max-num-seqs", "8", "--max-num-batched-tokens", "4"), 2, ["--max-num-batched-tokens"]),
        (("MODEL", "--block-size", "3"), 2, ["--block-size"]),
        (("MODEL", "--dp", "65"), 2, ["--dp 65: a server has at most 64 replicas"]),
        (("MODEL", "--prefill-replicas", "9", "--decode-replicas", "60"), 2, ["--decode-replicas 60: a server has at"]),
        (("MODEL", "--dp", "0"), 2, ["--dp must be at least 1, not 0"]),
        (("MODEL", "--dp", "-3"), 2, ["--dp must be at least 1, not -3"]),
        (("MODEL", "--dp", "9" * 30), 2, ["a server has at most 64 replicas"]),
        (("MODEL", "--host", "no.such.host.invalid"), 1, ["--host"]),
        (("MODEL", "--tokenizer", "/no/such/folder"), 1, ["/no/such/folder"]),
        (("MODEL", "--tokenizer", "tests"), 1, ["has no tokenizer (tokenizer.json)", "--tokenizer"]),
        (("MODEL", "--generation-config", "/no/such/folder"), 2, ["--generation-config /no/such/folder"]),
        (("MODEL", "--override-generation-config", '{"top_p": 2}'), 2, ["--override-generation-config", "top_p"]),
    ],
)
def test_what_cannot_start_says_so_in_one_line(model: str, flags: tuple[str, ...], code: int, said: list[str]):
    arguments = [model if flag == "MODEL" else flag for flag in flags]
    assert_one_line(run(*arguments, *DUMMY, "--port", "0"), code, *said)


def test_a_server_that_still_loads_has_its_port_and_says_so():
    from engine.api.ports import StartingResponder, bind, bind_all
    from engine.errors import RedlineError

    for count in (1, 2):
        first, *others = bind_all("127.0.0.1", 0, count)
        port = first.getsockname()[1]
        try:
            for take in (bind, lambda host, port: bind_all(host, port, 2)):
                with pytest.raises(RedlineError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
                    take("127.0.0.1", port)
            with StartingResponder(first):
                for _ in range(4):
                    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", content=b" " * 300_000, timeout=10)
                    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
                    assert answer.json()["error"]["code"] == "starting"
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/messages?beta=true", json={}, timeout=10)
                assert (answer.status_code, answer.json()["type"]) == (503, "error")
                assert answer.json()["error"]["type"] == "api_error"
        finally:
            for listener in (first, *others):
                listener.close()
        bind("127.0.0.1", port).close()
