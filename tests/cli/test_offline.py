"""`redline bench --offline`: the engine without a server, caches on and off."""

from pathlib import Path

import pytest

from bench.results import RunFiles
from cli.main import main
from tests.tiny import write_tiny

WORKLOAD = "kind: shared-prefix\nprefix: 32\ninput: 8\noutput: 4\nprefixes: 1\n"


def test_both_configurations_are_measured_and_a_second_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = write_tiny(tmp_path), tmp_path / "out"
    (tmp_path / "workload.yaml").write_text(WORKLOAD)
    asked = ["bench", "--offline", model, "--workload", str(tmp_path / "workload.yaml"), "--num-requests", "6"]
    asked += ["--out", str(out), "--", "--load-format", "dummy", "--kernels", "torch", "--max-model-len", "64"]
    assert main(asked) == 0
    files = RunFiles(out)
    off, on = files.read_points()
    assert [(p.configuration, p.phase, p.completed) for p in (off, on)] == [
        ("caches off", "offline", 6),
        ("caches on", "offline", 6),
    ]
    assert off.prefix_hit_rate == 0
    assert (on.prefix_hit_rate or 0) > 0.2
    assert off.seed == on.seed
    described = files.read_summary().configurations
    assert described["caches off"]["changed"]["enable_prefix_caching"] is False
    said = capsys.readouterr().out
    assert "Offline throughput, requests/s" in said
    assert f"results: {out}" in said
    started = [p.started for p in files.read_points()]
    assert main(asked) == 0
    assert [p.started for p in files.read_points()] == started


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--offline", "x", "--rate", "3"], "--rate cannot be combined with --offline"),
        (["--offline", "x", "--model", "y"], "use --offline MODEL, or a server"),
        (["--workload", "mmmu-pro", "--repeat", "0,50"], "several values of --repeat need --offline"),
        (["--repeat", "50"], "--repeat needs --images or --workload"),
        (["--images", "1", "--repeat", "101"], "not a percentage from 0 to 100"),
        (["--images", "1", "--turns", "2"], "use --images or --turns, not both"),
        (["--image-size", "5x5"], "--image-size needs --images"),
    ],
)
def test_flags_that_do_not_fit(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert words in capsys.readouterr().err
