"""Processes that a benchmark starts: none outlives it, however it ends. Linux only, as all that reads /proc."""

import multiprocessing
import subprocess
from collections.abc import Sequence
from typing import Any

import bench.child_processes
from bench.child_processes import before_exec


def start_child(command: Sequence[str], **options: Any) -> "subprocess.Popen[Any]":
    """As subprocess.Popen, for a process that is killed when this one ends.

    Call it in a thread that lives as long as the process shall: Linux sends the signal when that thread ends. Processes
    that the process starts are not killed; see GroupEnd.
    """
    return subprocess.Popen(command, preexec_fn=before_exec(), **options)


def run_child(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[Any]":
    """As subprocess.run, for a process that is killed when this one ends."""
    return subprocess.run(command, preexec_fn=before_exec(), **options)


def end_with_parent() -> None:
    """In a process of `multiprocessing`: have it killed when the process that started it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    bench.child_processes.end_with_parent(parent.pid)
