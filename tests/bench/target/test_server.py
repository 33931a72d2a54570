import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from bench.errors import BenchError
from bench.target.server import ServerProcess, free_port, has_flag, serve_flags

STUB = str(Path(__file__).parents[1] / "queue_server.py")


def test_starts_waits_and_leaves_nothing_behind(queue_server) -> None:  # type: ignore[no-untyped-def]
    server = queue_server()
    assert httpx.get(server.base_url + "/health", trust_env=False).status_code == 200
    assert server.alive()
    server.stop()
    assert not server.alive()
    assert "interrupted" in server.cause()
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.base_url + "/health", trust_env=False)


def test_a_server_that_refuses_to_start_is_quoted(tmp_path: Path) -> None:
    command = [sys.executable, STUB, "--port", "{port}", "--refuse", "one sequence needs 3 GiB: lower --max-model-len"]
    with pytest.raises(BenchError) as caught, ServerProcess(command, tmp_path / "server.log"):
        pass
    assert "lower --max-model-len" in str(caught.value)
    assert "exit code 1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot start 'no-such-program'"):
        ServerProcess("no-such-program --port {port}", tmp_path / "server.log").start()


def test_a_server_that_never_answers_is_given_up_on_and_stopped(tmp_path: Path) -> None:
    script = "import time; print('loading for ever', flush=True); time.sleep(600)"
    server = ServerProcess([sys.executable, "-c", script], tmp_path / "server.log", start_limit_s=1.0)
    with pytest.raises(BenchError, match="loading for ever"):
        server.start()
    assert not server.alive()


def test_a_stubborn_group_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.target.server._GRACE_S", (0.3, 0.3, 5.0))
    pids = tmp_path / "pids"
    script = (
        "import os, signal, subprocess, sys\n"
        "for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        f"sys.argv = ['stub', '--port', sys.argv[1]]; exec(open({STUB!r}).read())\n"
    )
    with ServerProcess([sys.executable, "-c", script, "{port}"], tmp_path / "server.log", start_limit_s=60):
        both = [int(pid) for pid in pids.read_text().split()]
        assert all(psutil.pid_exists(pid) for pid in both)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in both)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_the_server_ends_when_the_run_is_killed_outright(stopped: bool, tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom bench.target.server import ServerProcess\n"
        f"server = ServerProcess([sys.executable, {STUB!r}, '--port', '{{port}}'], {str(tmp_path / 'log')!r})\n"
        "server.start()\nprint(server._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert _runs(pid)
        if stopped:
            psutil.Process(pid).suspend()
        os.kill(run.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def test_redline_command_line(tmp_path: Path) -> None:
    server = ServerProcess.redline("smollm2-135m", ["--max-num-seqs", "16"], tmp_path / "log")
    assert server.command[1:5] == ["-m", "cli.main", "serve", "smollm2-135m"]
    assert server.command[5:9] == ["--max-num-seqs", "16", "--host", "127.0.0.1"]
    assert server.base_url == f"http://127.0.0.1:{server.command[-1]}"
    given = ServerProcess.redline("m", ["--host=0.0.0.0", "--port", "8123"], tmp_path / "log")
    assert given.base_url == "http://127.0.0.1:8123"
    assert given.command.count("--port") == 1
    ipv6 = ServerProcess.redline("m", ["--host", "::1", "--port", "8123", "--ssl-certfile", "c.pem"], tmp_path / "log")
    assert ipv6.base_url == "https://[::1]:8123"


def test_flags() -> None:
    assert serve_flags({"enable-prefix-caching": False, "max_num_seqs": 16, "seed": None, "x": True}) == [
        "--no-enable-prefix-caching", "--max-num-seqs", "16", "--x",
    ]  # fmt: skip
    assert has_flag(["--max_model_len=8"], "--max-model-len")
    assert not has_flag(["--max-model-len-x", "8"], "--max-model-len")
    assert 1024 < free_port() < 65536
