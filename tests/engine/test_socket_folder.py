"""The folder of an engine's sockets, in temporary directories of all kinds."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import zmq

from engine.errors import RedlineError
from engine.socket_folder import SocketFolder, candidates, find_parent

OWNER = "import os, sys; from engine.socket_folder import SocketFolder; print(SocketFolder().path, flush=True); input()"


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", OWNER]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    theirs = owner.stdout.readline().strip()
    mine = SocketFolder()
    assert os.path.isdir(theirs), "its owner lives"
    owner.kill()
    owner.communicate()
    another = SocketFolder()
    assert not os.path.exists(theirs)
    assert os.path.isdir(mine.path)
    for folder in (mine, another, mine):
        folder.remove()
    assert os.listdir(tmp_path) == []


def test_a_long_temporary_directory_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    folder = SocketFolder()
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        socket.bind(f"ipc://{folder.path}/{'r' * 30}")
    folder.remove()
    assert os.listdir(long) == []


def test_without_any_short_directory_the_variable_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("engine.socket_folder.LONGEST_PARENT", 1)
    assert list(candidates())
    with pytest.raises(RedlineError, match="TMPDIR"):
        find_parent()
