"""A server of a tiny LLaVA: API processes × replicas with real pools, caches and workers."""

import base64
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.engine.worker.mm_models_llava import MODELS
from tests.serving import Served, serve

# 40 KiB for each API process: four inputs.
FLAGS = ("--api-servers", "2", "--dp", "2", "--mm-processors", "2", "--mm-cache-gb", "0.00008", "--dtype", "float32",
         "--max-model-len", "256", "--kernels", "torch", "--kv-cache-memory-bytes", "8MiB")  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llava")
    MODELS["llava"].build(folder)
    return str(folder)


def url_of(color: int, size: int = 28) -> str:
    file = io.BytesIO()
    Image.new("RGB", (size, size), (color * 40 % 256, color, 255 - color)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def ask(server: Served, *colors: int) -> httpx.Response:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url_of(color)}} for color in colors]
    body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}],
            "max_tokens": 4, "temperature": 0, "ignore_eos": True}  # fmt: skip
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=100)  # a connection each


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def processes(server: Served, module: str) -> list[psutil.Process]:
    every = psutil.Process(server.process.pid).children(recursive=True)
    return [one for one in every if module in " ".join(one.cmdline())]


def feature_folders(server: Served) -> set[Path]:
    """The folders in shared memory whose lock one of the server's processes has."""
    every = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    found = set()
    for process in every:
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            target = os.readlink(descriptor) if descriptor.is_symlink() else ""
            if "redline-mm-" in target:
                found.add(Path(target).parent)
    return found


@pytest.fixture(scope="module")
def served(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("log"), model, *FLAGS) as running:
        yield running


def test_answers_do_not_depend_on_caches_and_no_mirror_drifts(served: Served) -> None:
    expected = {color: text_of(ask(served, color)) for color in range(8)}
    colors = [color * 5 % 8 for color in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda color: text_of(ask(served, color)), colors))
    assert answers == [expected[color] for color in colors]
    assert served.metric("redline:mm_mirror_misses_total") == 0
    assert served.metric("vllm:mm_cache_queries_total") == 32
    assert served.metric("vllm:mm_cache_hits_total") + served.metric("redline:mm_pool_inputs_total") == 32
    assert served.metric("redline:mm_cache_bytes") <= 2 * 43_000
    assert len(feature_folders(served)) == 4, "of two API processes and two replicas"


def test_a_process_of_the_pool_that_is_killed_fails_only_its_request(served: Served) -> None:
    text_of(ask(served, 100))
    before = processes(served, "pool_process")
    assert before
    stopped = [process.pid for process in before]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)  # whatever comes next is in the hands of one of them
    failed: list[httpx.Response] = []
    asking = [threading.Thread(target=lambda n=n: failed.append(ask(served, 101 + n))) for n in range(2)]
    for thread in asking:
        thread.start()
    time.sleep(1.0)
    for pid in stopped:
        os.kill(pid, signal.SIGKILL)
    for thread in asking:
        thread.join()
    causes = [answer.json()["error"]["message"] for answer in failed if answer.status_code != 200]
    assert causes, "no process had a request"
    assert all("could not be processed" in cause and "SIGKILL" in cause for cause in causes), causes
    assert {answer.status_code for answer in failed} <= {200, 500}
    assert text_of(ask(served, 103))
    assert served.metric("redline:mm_pool_failures_total") == len(causes)


def test_nothing_is_left_after_the_server_is_killed(served: Served) -> None:
    """Last, since the others need the server."""
    text_of(ask(served, 1))
    found = feature_folders(served)
    assert found
    family = psutil.Process(served.process.pid).children(recursive=True)
    for process in family:
        process.suspend()
    served.process.kill()
    deadline = time.monotonic() + 20
    while any(folder.exists() for folder in found) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [folder for folder in found if folder.exists()]
    assert not psutil.wait_procs(family, timeout=20)[1], "stopped processes outlive it"
