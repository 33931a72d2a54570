"""Result files on a disk that is full, or that cannot be written to."""

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.errors import BenchError
from bench.measurement.run import BenchOptions, Subject, measure_configuration
from bench.measurement.server import HttpServer
from bench.results import RequestRecord, RunFiles
from bench.results.vllm_json import save_vllm_result
from bench.results.writing import CannotWriteError, check_folder, replace_file
from bench.sweeps.sweep import run_sweep
from bench.sweeps.sweepfile import read_sweep
from bench.target import Target
from bench.target.server import ServerProcess
from bench.workloads import make_workload
from tests.bench.quiet_progress import QuietProgress
from tests.bench.records import plain_point, plain_request


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 32 KB: the system's own refusal, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def large_requests() -> list[RequestRecord]:
    gaps = np.random.default_rng(0).random(20_000).tolist()
    return [plain_request(chunk_gaps_s=gaps, chunk_tokens=[1] * 20_001)]


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_leaves_no_part_and_keeps_the_point(tmp_path: Path) -> None:
    files = RunFiles(tmp_path)
    files.add_point(plain_point(point_id="first"), [plain_request()])
    with pytest.raises(CannotWriteError, match=rf"^{tmp_path} cannot be written: File too large \(--out\)$"):
        files.add_point(plain_point(point_id="second", rate=2.0), large_requests())
    assert not list(tmp_path.glob("**/*.part"))
    assert "File too large" in files.unwritten
    assert [p.point_id for p in files.read_points()] == ["first", "second"]
    assert len(files.read_requests("second")["chunk_gaps_s"][0]) == 20_000
    assert [p.point_id for p in RunFiles(tmp_path).read_points()] == ["first"]
    with pytest.raises(CannotWriteError, match=r"x.json cannot be written: File too large \(--save-vllm-json\)"):
        save_vllm_result(tmp_path / "x.json", {"itls": [0.123456789] * 10_000})
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_is_found_before(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"a/b cannot be written: File too large \(--out\)"):
        check_folder(tmp_path / "a" / "b", "--out")
    assert not list(tmp_path.iterdir())


def test_a_check_leaves_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "a" / "b", "--out")
    check_folder(tmp_path, "--out")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    def interrupted(part: Path) -> None:
        part.write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        replace_file(tmp_path / "x", interrupted)
    assert (tmp_path / "x").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("patient_generator")
def test_a_run_ends_with_what_it_found(queue_server: Callable[..., ServerProcess], tmp_path: Path) -> None:
    server, files = queue_server("--slots", "4", "--service", "0.1"), RunFiles(tmp_path / "out")

    class Filling(QuietProgress):
        """Where something takes the folder's place after the first point."""

        def point_finished(self, row: object) -> None:
            self.messages.append(f"shown {row.rate:g}")  # type: ignore[attr-defined]
            if not (tmp_path / "gone").exists():
                (tmp_path / "out").rename(tmp_path / "gone")
                (tmp_path / "out").write_text("in the way")

    workload = make_workload({"kind": "random", "input": 20, "output": 5}, 1000)
    options = BenchOptions(precision=0.2, rates=[10.0, 15.0, 20.0], window_s=1.0)
    progress = Filling()
    subject = Subject(HttpServer(Target(server.base_url, "stub")), workload, "c", options, files, progress)
    with pytest.raises(CannotWriteError, match=r"out cannot be written: .*\(--out\)") as caught:
        measure_configuration(subject)
    assert caught.value.answer.rate == 15.0  # the last one measured counts, though it isn't on disk
    assert progress.messages[-1] == "shown 15"


def test_a_sweep_checks_its_folder_before_it_starts_a_server(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "configurations: {a: {command: 'no-such-program --port {port}'}}\n"
        "workloads: [{kind: random, input: 5, output: 5}]\n"
    )
    (tmp_path / "file").write_text("here")
    with pytest.raises(CannotWriteError, match=r"file/out cannot be written: Not a directory \(--out\)"):
        run_sweep(read_sweep(path), tmp_path / "file" / "out", QuietProgress())
