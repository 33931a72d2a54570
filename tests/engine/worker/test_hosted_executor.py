"""Adapters of ranks on several machines: their files are provided before ranks load them."""

import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.errors import ModelError, RedlineError
from engine.memory import resolve
from engine.model.model_info import read_model_info
from engine.worker.hosted_executor import HostedExecutor
from engine.worker.model_copy import ModelCopy, copy_key, list_adapter
from engine.worker.tcp_links import TcpLinks
from tests.engine.worker.driver import build_model
from tests.engine.worker.loopback_hosts import LoopbackHosts
from tests.engine.worker.lora_files import write_adapter

PATIENCE_S = 60.0


class Hosts(LoopbackHosts):
    """Makes a copy of each adapter where ranks look for it."""

    def __init__(self) -> None:
        super().__init__()
        self.provided: list[tuple[Path, bool]] = []
        self.copies: list[Path] = []
        self.error: Exception | None = None
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def provide_adapter(self, path: Path, *, distribute: bool) -> str:
        self.may_go_on.wait(PATIENCE_S)
        self.provided.append((path, distribute))
        if self.error is not None:
            raise self.error
        if not (files := list_adapter(path)):
            return ""
        copy = ModelCopy(copy_key(path, files))
        copy.begin(files)
        for file in files:
            copy.write(file.name, 0, (path / file.name).read_bytes())
        sums = {file.name: hashlib.sha256((path / file.name).read_bytes()).hexdigest() for file in files}
        self.copies.append(copy.finish(sums))
        for file in files:
            (path / file.name).unlink()  # as on a machine that lacks them
        return copy_key(path, files)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HostedExecutor, Hosts, Callable[[str], Path]]]:
    folder = tmp_path_factory.mktemp("hosted")
    model = build_model("llama", folder / "model", head_dim=16)
    config = EngineConfig(
        model=str(folder / "model"), tensor_parallel_size=2, dtype="float32", kernels="torch", block_size=16,
        kv_cache_memory_bytes=1 << 20, distributed_executor_backend="ray", distribute_weights=True,
    )  # fmt: skip
    info = read_model_info(config)
    hosts = Hosts()
    executor = HostedExecutor(
        config, info, resolve(config, info).config, links=TcpLinks(hosts), hosts=hosts, distribute=True
    )
    yield executor, hosts, lambda name: write_adapter(folder / name, model, ("q_proj",), 1)
    executor.shutdown()
    for copy in hosts.copies:
        shutil.rmtree(copy)


Running = tuple[HostedExecutor, Hosts, Callable[[str], Path]]


def test_ranks_load_the_copies_that_were_sent(running: Running) -> None:
    executor, hosts, write = running
    path = write("sent")
    hosts.may_go_on.clear()
    loading = executor.call("load_adapter", {"key": "one#1", "path": str(path)})
    assert not loading.done(), "the caller waits for no file"
    hosts.may_go_on.set()
    assert loading.result(PATIENCE_S) > 0
    assert hosts.provided[-1] == (path, True)
    executor.call("unload_adapter", {"key": "one#1"}).result(PATIENCE_S)
    with pytest.raises(ModelError, match="no adapter has the key"):
        executor.call("unload_adapter", {"key": "one#1"}).result(PATIENCE_S)


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (ModelError("node 10.0.0.2 has no files"), ModelError, "^node 10.0.0.2 has no files$"),
        (OSError("the disk is gone"), RedlineError, "adapter could not be sent: .*the disk is gone"),
    ],
)
def test_files_that_can_not_be_provided_are_the_error_of_the_call(
    error: Exception, raised: type[Exception], words: str, running: Running
) -> None:
    executor, hosts, _ = running
    hosts.error = error
    try:
        with pytest.raises(raised, match=words):
            executor.call("load_adapter", {"key": "two#2", "path": "/an/adapter"}).result(PATIENCE_S)
    finally:
        hosts.error = None


def test_a_folder_that_is_no_adapter_is_named_by_the_ranks(running: Running, tmp_path: Path) -> None:
    executor, _, _ = running
    with pytest.raises(ModelError, match=f"{tmp_path} isn't an adapter: it needs adapter_config.json"):
        executor.call("load_adapter", {"key": "three#3", "path": str(tmp_path)}).result(PATIENCE_S)
