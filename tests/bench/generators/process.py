"""`redline generate` as a process of its own."""

import os
import re
import subprocess
import sys
import threading
from types import TracebackType

from bench.child_processes import before_exec
from bench.generators.handshake import TOKEN_VARIABLE

TOKEN = "a token of the tests"


class GeneratorProcess:
    """Started when it is made; `lines` is what it printed."""

    def __init__(self, *flags: str, port: int = 0, token: str = TOKEN):
        command = [sys.executable, "-m", "cli.main", "generate", "--listen", f"127.0.0.1:{port}", *flags]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {TOKEN_VARIABLE: token},
            preexec_fn=before_exec(),
        )  # fmt: skip
        self.lines: list[str] = []
        first = self._read()
        found = re.search(r"waiting for runs on 127\.0\.0\.1:(\d+)", first)
        assert found is not None, first
        self.port = int(found[1])
        self.address = f"127.0.0.1:{self.port}"
        self._reader = threading.Thread(target=self._read_all, daemon=True)
        self._reader.start()

    def __enter__(self) -> "GeneratorProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it without a word, as a host does that loses its power."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.lines.append(line)
        return line

    def _read_all(self) -> None:
        while self._read():
            pass
