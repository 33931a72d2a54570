"""What is said of the target reaches all of the tool: probing, measuring, metrics and health."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.results import RunFiles
from bench.sweeps.sweepfile import read_sweep
from bench.target import Target
from bench.target.metrics import MetricsReader
from cli.main import main
from tests.bench.gateway import Gateway

pytestmark = pytest.mark.usefixtures("patient_generator")

TEAM = ("X-Team", "blue")
LOAD = ["--input", "8", "--output", "6", "--concurrency", "2", "--num-requests", "4", "--vocab-size", "1000"]
STRICT = ["--no-ignore-eos", "--no-stream-options", "--extra-body", '{"top_k": 1}']


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    file, key = folder / "certificate.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key, "-out", file]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*made, *names], check=True, capture_output=True)
    return file, key


def measured(gateway: Gateway, out: Path, *flags: str, url: str | None = None) -> int:
    return main(["bench", "--url", url or gateway.url + "/v1", *LOAD, "--out", str(out), *flags])


def test_a_strict_server_behind_a_gateway(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No list of models, a base path, a header, a key, unknown fields refused, no usage, three tokens a chunk."""
    with Gateway("/team/llm", header=TEAM, per_chunk=3) as gateway:
        flags = ["--model", "m", "-H", "X-Team: blue", "--api-key", "secret", *STRICT]
        code = measured(gateway, tmp_path / "o", *flags)
        output = capsys.readouterr().out
    point = RunFiles(tmp_path / "o").read_points()[-1]
    assert (point.completed, point.failed, point.preemptions) == (4, 0, 0), output
    assert point.tokens_per_chunk == pytest.approx(3)
    assert code == (0 if point.valid else 1)
    assert "assuming that the model 'm' exists" in output
    assert gateway.refused == 0
    prompt = gateway.bodies[-1].pop("prompt")
    assert len(prompt) == 8
    asked = {"model": "m", "max_tokens": 6, "temperature": 0.0, "stream": True, "top_k": 1}
    assert gateway.bodies[-1] == asked
    assert {"/team/llm/v1/models", "/team/llm/metrics/", "/team/llm/v1/completions"} <= gateway.paths()
    for _, path, headers in gateway.asked:
        assert path.startswith("/team/llm/")
        assert (headers["X-Team"], headers["Authorization"]) == ("blue", "Bearer secret"), path
    said = RunFiles(tmp_path / "o").read_summary().configurations["bench"]
    assert said["requests"] == {
        "headers": ["X-Team"], "extra_body": {"top_k": 1}, "ignore_eos": False, "stream_options": False,
    }  # fmt: skip
    assert "secret" not in (tmp_path / "o" / "summary.json").read_text()


@pytest.mark.parametrize("trusting", ["ca", "insecure", "environment"])
def test_tls(
    certificate: tuple[Path, Path], trusting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = {"ca": ["--ca", str(certificate[0])], "insecure": ["--insecure"], "environment": []}[trusting]
    if trusting == "environment":
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    with Gateway(models=["m"], certificate=certificate) as gateway:
        measured(gateway, tmp_path / "o", *STRICT, *flags)
        point = RunFiles(tmp_path / "o").read_points()[-1]
        assert (point.completed, point.preemptions) == (4, 0), capsys.readouterr()
        monkeypatch.delenv("SSL_CERT_FILE", raising=False)
        assert measured(gateway, tmp_path / "p") == 1
        assert "(--ca or --insecure)" in capsys.readouterr().err


def test_a_misspelt_model_is_refused_before_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Gateway(models=["llama-8b", "llama-70b"]) as gateway:
        assert measured(gateway, tmp_path, "--served-model", "lama-8b") == 1
        assert gateway.bodies == []
    assert "did you mean 'llama-8b'?" in capsys.readouterr().err


def test_a_first_request_that_is_refused_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Gateway(models=["m"]) as gateway:
        assert measured(gateway, tmp_path) == 1
    assert "failed with http 400 not known: ['ignore_eos', 'stream_options']" in capsys.readouterr().err


def test_a_proxy_is_said_and_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    with Gateway(models=["m"]) as gateway:
        measured(gateway, tmp_path / "o", *STRICT)
    assert RunFiles(tmp_path / "o").read_points()[-1].completed == 4
    assert "HTTP_PROXY is ignored" in capsys.readouterr().out


def test_metrics_at_the_root_where_only_the_api_has_a_path() -> None:
    with Gateway() as gateway, MetricsReader(Target(gateway.url + "/openai/v1")) as reader:
        assert reader.available
        assert reader.latest is not None
        assert reader.latest.preemptions == 0
        assert reader.healthy()
        assert {"/openai/metrics", "/metrics/"} <= gateway.paths()


def test_sweeps_of_servers_that_run(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    with Gateway("/team", models=["m", "n"], header=TEAM) as gateway:
        asking = (
            "headers: {X-Team: blue}, ignore_eos: false, stream_options: false, extra_body: {top_k: 1}, vocab_size: 99"
        )
        file.write_text(
            f"configurations:\n  gateway: {{url: '{gateway.url}/v1', served_model: n, {asking}}}\n"
            "workloads: [{kind: random, input: 8, output: 6}]\noptions: {rates: [20], window: 0.5}\n"
        )
        out = tmp_path / "o"
        main(["sweep", str(file), "--out", str(out)])
    points = RunFiles(out).read_points()
    assert [p.phase for p in points] == ["probe", "fixed"]
    assert (points[1].failed, points[1].preemptions) == (0, 0)
    assert gateway.refused == 0
    assert {body["model"] for body in gateway.bodies} == {"n"}
    said = RunFiles(out).read_summary().configurations["gateway"]
    assert said["url"] == gateway.url
    assert said["requests"]["headers"] == ["X-Team"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"url": "http://h:{port}"}, "url must be the address"),
        ({"url": "h:8000"}, "not a valid server URL"),
        ({"url": "http://h", "serve": {"seed": 1}}, "url must be the address"),
        ({"command": "x {port}", "headers": ["a"]}, "headers must be a mapping"),
        ({"command": "x {port}", "headers": {"a b": "c"}}, "not a valid header name"),
        ({"command": "x {port}", "extra_body": [1]}, "extra_body must be a mapping"),
        ({"command": "x {port}", "extra_body": {"stream": True}}, "'stream' cannot be set with --extra-body"),
        ({"command": "x {port}", "insecure": "yes"}, "insecure must be true or false"),
        ({"command": "x"}, "must contain {port}"),
    ],
)
def test_fields_of_a_sweep_that_are_wrong(tmp_path: Path, fields: dict[str, object], words: str) -> None:
    file = tmp_path / "s.yaml"
    workloads = [{"kind": "random", "input": 8, "output": 6}]
    file.write_text(json.dumps({"configurations": {"c": fields}, "workloads": workloads}))
    with pytest.raises(BenchError) as caught:
        read_sweep(file)
    assert words in str(caught.value)
