"""Several API processes in front of one core: one port, one set of figures, one end."""

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.cli.test_serve import DUMMY, assert_gone, assert_one_line, children, run
from tests.serving import Served, serve

PROCESSES = 3
TEMPLATE = "{% for message in messages %}{{ message.content }};{% endfor %}"
BODY = {"prompt": "hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = (*DUMMY, "--api-servers", str(PROCESSES), "--served-model-name", "tiny", "--max-model-len", "1K",
             "--override-generation-config", '{"top_k": 1}', "--chat-template", TEMPLATE)  # fmt: skip
    with serve(tmp_path_factory.mktemp("log"), model, *flags) as running:
        yield running


def lines_of(server: Served) -> list[dict]:
    """The structured lines of requests that ended."""
    return [json.loads(found) for found in re.findall(r"redline\.request: (\{.*\})$", server.output(), re.MULTILINE)]


def test_all_processes_answer_and_the_figures_are_those_of_all(served: Served):
    before = served.metric("vllm:request_success_total")
    asked, front_ends = 0, set()
    while len(front_ends) < PROCESSES:
        answer = httpx.post(f"{served.url}/v1/completions", json=BODY, timeout=60)  # a connection each
        assert answer.status_code == 200
        asked += 1
        assert asked < 200, f"only the processes {front_ends} answer"
        front_ends = {line["front_end"] for line in lines_of(served)}
    for _ in range(12):  # whichever process answers
        text = httpx.get(f"{served.url}/metrics", timeout=60).text
        values = {name: float(value) for name, value in re.findall(r"^(\S+?)(?:\{.*\})? (\S+)$", text, re.MULTILINE)}
        assert values["vllm:generation_tokens_total"] == 6 * asked
        assert values["vllm:time_to_first_token_seconds_count"] == before + asked
        assert values["vllm:inter_token_latency_seconds_count"] == 5 * asked
        assert values["vllm:num_requests_running"] == 0
        health = httpx.get(f"{served.url}/health", timeout=60)
        assert health.status_code == 200
        assert health.json()["last_step_age_s"] >= 0
    assert served.metric("vllm:request_success_total") == before + asked


def test_sampling_defaults_are_those_of_all_processes(served: Served):
    assert re.search(r"sampling defaults +top_k 1", served.output())
    greedy = served.post("/v1/completions", **BODY)["choices"][0]["text"]
    body = {name: value for name, value in BODY.items() if name != "temperature"}
    found = [httpx.post(f"{served.url}/v1/completions", json=body, timeout=60).json() for _ in range(12)]
    assert {answer["choices"][0]["text"] for answer in found} == {greedy}
    own = [httpx.post(f"{served.url}/v1/completions", json=body | {"top_k": 0}, timeout=60).json() for _ in range(6)]
    assert len({answer["choices"][0]["text"] for answer in own}) > 1


def test_any_process_continues_a_response(served: Served):
    def ask(method: str, path: str, **body: Any) -> httpx.Response:
        """With a connection of its own."""
        return httpx.request(method, f"{served.url}/v1/responses{path}", timeout=60, **({"json": body} if body else {}))

    first = ask("POST", "", input="hello", max_output_tokens=4).json()
    for _ in range(8):
        assert ask("GET", f"/{first['id']}").json() == first
        assert len(ask("GET", f"/{first['id']}/input_items").json()["data"]) == 1
        follow = ask("POST", "", input="more", previous_response_id=first["id"], max_output_tokens=4)
        assert follow.status_code == 200, follow.text
    assert len(ask("GET", f"/{follow.json()['id']}/input_items").json()["data"]) == 3
    assert ask("DELETE", f"/{first['id']}").json()["deleted"]
    for _ in range(8):
        assert ask("GET", f"/{first['id']}").status_code == 404


def test_a_request_s_line_tells_its_story(served: Served):
    answer = served.post("/v1/completions", **BODY)
    deadline = time.monotonic() + 10
    while not (found := [line for line in lines_of(served) if line["request"] == answer["id"]]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    [line] = found
    assert (line["model"], line["prompt_tokens"], line["output_tokens"]) == ("tiny", 5, 6)
    assert (line["finish_reason"], line["preemptions"], line["error"]) == ("length", 0, None)
    assert 0 <= line["queue_s"] <= line["ttft_s"] <= line["e2e_s"]
    assert line["client"].startswith("127.0.0.1:")


def test_the_port_is_not_shared_with_another_server(served: Served, model: str):
    port = served.url.rsplit(":", 1)[1]
    assert_one_line(run(model, *DUMMY, "--port", port, "--api-servers", "2"), 1, f"port {port}", "--port")


def test_ctrl_c_lets_the_requests_of_all_processes_finish(model: str, tmp_path: Path):
    with serve(tmp_path, model, *DUMMY, "--api-servers", "2") as server:
        family = children(server.process)
        assert len(family) == 2, "the core and one more API process"
        clients: list[httpx.Client] = []
        while len(clients) < 8 or len({line["front_end"] for line in lines_of(server)}) < 2:
            clients.append(httpx.Client(base_url=server.url, timeout=60))  # a connection each, which it keeps
            assert clients[-1].post("/v1/completions", json=BODY).status_code == 200
            assert len(clients) < 200, "only one process answers"
        answers: list[list[str]] = []
        started = threading.Semaphore(0)

        def stream(client: httpx.Client) -> None:
            body = {**BODY, "max_tokens": 200, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                first = next(lines)
                started.release()
                answers.append([first, *(line for line in lines if line)])

        threads = [threading.Thread(target=stream, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert started.acquire(timeout=60)
        server.process.send_signal(signal.SIGINT)
        for thread in threads:
            thread.join(60)
        assert server.process.wait(30) == 0
        assert_gone(family)
        assert [lines[-1] for lines in answers] == ["data: [DONE]"] * len(clients)
        assert all('"finish_reason":"length"' in lines[-2] for lines in answers)
        long = [line["front_end"] for line in lines_of(server) if line["output_tokens"] == 200]
        assert (len(long), len(set(long))) == (len(clients), 2)


def test_a_killed_core_ends_the_server_with_its_cause(model: str, tmp_path: Path):
    with serve(tmp_path, model, *DUMMY, "--api-servers", "2") as server:
        family = children(server.process)
        [killed] = [process for process in family if "engine.launch" in process.cmdline()]
        os.kill(killed.pid, signal.SIGKILL)
        assert server.process.wait(30) == 1
        assert_gone(family)
        last = server.output().splitlines()[-1]
        assert last.startswith(f"redline: error: the EngineCore (process {killed.pid}) was killed by SIGKILL")
        assert "Traceback" not in server.output()


def test_a_killed_api_process_is_started_again_and_the_others_serve_on(model: str, tmp_path: Path):
    with serve(tmp_path, model, *DUMMY, "--api-servers", "2", "--shutdown-timeout", "1") as server:
        family = children(server.process)
        [killed] = [process for process in family if "engine.api.process" in process.cmdline()]
        body = {**BODY, "max_tokens": 400, "stream": True}  # the first goes on when the last begins
        with contextlib.ExitStack() as stack:
            streams: list[Iterator[str]] = []
            for _ in range(12):  # with a process each, or the other
                client = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
                answer = stack.enter_context(client.stream("POST", "/v1/completions", json=body))
                streams.append(answer.iter_lines())
                next(streams[-1])
            assert server.metric("vllm:num_requests_running") == 12
            os.kill(killed.pid, signal.SIGKILL)
            cut = whole = 0
            for lines in streams:
                try:
                    last = [line for line in lines if line][-1]
                except httpx.RemoteProtocolError:
                    cut += 1
                else:
                    assert last == "data: [DONE]"
                    whole += 1
            assert (cut > 0, whole > 0) == (True, True), "the kernel deals connections out to both"
        deadline = time.monotonic() + 60
        while sum("engine.api.process" in one.cmdline() for one in children(server.process)) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        front_ends = set()
        while len(front_ends) < 2:  # all connections are answered, those to the process that starts included
            answer = httpx.post(f"{server.url}/v1/completions", json=BODY, timeout=60)
            assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 6)
            assert time.monotonic() < deadline
            front_ends = {line["front_end"] for line in lines_of(server) if line["output_tokens"] == 6}
        assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
        assert server.metric("vllm:kv_cache_usage_perc") == 0, "what the killed process had was aborted"
        assert f"(process {killed.pid}) was killed by SIGKILL" in server.output()
        assert server.process.poll() is None
        # And the server's end is bounded, although a request goes on.
        body["max_tokens"] = 4000
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            family = children(server.process)
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(60) == 0
            assert time.monotonic() - began >= 1
            text = "\n".join(lines)
        assert "--shutdown-timeout" in text, "the client learns why"
        assert '"error"' in text
        assert_gone(family)


def test_no_process_outlives_a_killed_server(served: Served):
    """Last, since the others need the server. A stopped process can't notice anything: the system continues it."""
    family: list[psutil.Process] = children(served.process)
    assert len(family) == PROCESSES, "the core and the other API processes"
    for process in family[:-1]:
        process.suspend()
    served.process.kill()
    served.process.wait(10)
    assert_gone(family)
