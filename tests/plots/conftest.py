import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plots.made import DEMO, TWO, Server, write_run


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Result folders by what is in them, each written once and then copied."""
    root = tmp_path_factory.mktemp("templates")
    written: dict[str, Path] = {}

    def template(servers: dict[str, Server], workloads: dict[str, float], **kw) -> Path:
        key = repr((servers, workloads, kw))
        if key not in written:
            written[key] = write_run(root / str(len(written)), servers, workloads, **kw)
        return written[key]

    return template


@pytest.fixture
def make_run(tmp_path: Path, templates: Callable[..., Path]) -> Callable[..., Path]:
    """Puts a result folder in place: make_run("name", servers, workloads)."""

    def make(
        name: str, servers: dict[str, Server] | None = None, workloads: dict[str, float] | None = None, **kw
    ) -> Path:
        return Path(shutil.copytree(templates(servers or TWO, workloads or DEMO, **kw), tmp_path / name))

    return make


@pytest.fixture
def demo(make_run: Callable[..., Path]) -> Path:
    return make_run("demo")
