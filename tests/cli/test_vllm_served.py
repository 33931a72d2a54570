"""A command as it is printed for vLLM, served for real: HTTPS, a path of a proxy, several names, V0 by its option."""

import contextlib
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from cli.main import main
from engine.api.ports import StartingResponder, bind
from engine.api.tls import read_certificate
from tests.serving import Served, serve

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-made certificate and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-keyout",
        key,
        "-out",
        certificate,
    ]
    subprocess.run(
        [*make, "-subj", "/CN=redline", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True
    )
    return certificate, key


@pytest.fixture(scope="module")
def served(model: str, tls: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    certificate, key = tls
    flags = [
        "--load-format", "dummy", "--served-model-name", "first", "second", "--dtype", "float", "--max-model-len", "-1",
        "--ssl-keyfile", str(key), "--ssl-certfile", str(certificate), "--root-path", "/team/llm/",
        "--num-scheduler-steps", "4", "--enforce-eager", "--swap-space", "4", "--disable-log-requests",
        "--chat-template", TEMPLATE, "--api-server-count", "2", "--api-key", "one", "two",
    ]  # fmt: skip
    with serve(tmp_path_factory.mktemp("log"), model, *flags, certificate=certificate) as running:
        running.client.headers["Authorization"] = "Bearer two"
        yield running


def test_all_names_are_answered_over_https_under_the_path(served: Served, tls: tuple[Path, Path]) -> None:
    trusted = ssl.create_default_context(cafile=tls[0])
    with httpx.Client(verify=trusted) as http:
        client = openai.OpenAI(base_url=f"{served.url}/team/llm/v1", api_key="one", max_retries=0, http_client=http)
        assert [model.id for model in client.models.list().data] == ["first", "second"]
        texts = set()
        for name in ("first", "second"):
            chunks = list(
                client.completions.create(model=name, prompt="hello", max_tokens=8, temperature=0, stream=True)
            )
            assert {chunk.model for chunk in chunks} == {name}
            texts.add("".join(chunk.choices[0].text for chunk in chunks))
        assert len(texts) == 1
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="third", prompt="hello")


def test_paths_without_the_prefix_are_those_that_a_proxy_asks(served: Served) -> None:
    assert served.client.get("/v1/models").status_code == 200
    assert served.client.get("/team/llm/v1/models").status_code == 200
    assert served.client.get("/team/llm/openapi.json").json()["servers"] == [{"url": "/team/llm"}]
    assert served.client.get("/another/v1/models").status_code == 404
    for path in ("/health", "/team/llm/health"):
        assert served.client.get(path, headers={"Authorization": ""}).status_code == 200
        assert served.client.get(path.replace("health", "v1/models"), headers={"Authorization": ""}).status_code == 401


def test_the_chat_template_is_the_given_one(served: Served) -> None:
    messages = [{"role": "user", "content": "hello"}]
    asked = {"model": "second", "messages": messages, "add_generation_prompt": False}
    ids = served.post("/tokenize", **asked)["tokens"]
    assert served.post("/detokenize", model="first", tokens=ids)["prompt"] == "<user> hello\n"
    assert served.post("/v1/chat/completions", model="first", messages=messages, max_tokens=3)["choices"]


def test_the_start_says_what_became_of_the_flags(served: Served) -> None:
    output = served.output()
    assert f"listening on {served.url}" in output
    notes = [line for line in output.splitlines() if line.startswith("note: ")]
    assert [note.split()[1] for note in notes] == ["--swap-space", "--num-scheduler-steps:"]
    assert "runs as --engine v0" in notes[-1]
    assert "4,096 tokens" in output, "the model's own length, as memory suffices"


def test_plain_http_is_no_answer_and_ends_nothing(served: Served) -> None:
    host, port = served.url.removeprefix("https://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in plain.recv(1000)
    assert served.client.get("/health").status_code == 200
    assert "Traceback" not in served.output()


def make_key(folder: Path) -> Path:
    key = folder / "locked.pem"
    command = ["openssl", "genpkey", "-algorithm", "rsa", "-aes256", "-pass", "pass:secret", "-out", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return key


def test_certificates_that_cannot_be_served_are_one_line(
    model: str, tls: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate, key = map(str, tls)
    (tmp_path / "text.pem").write_text("no certificate")
    text, locked = str(tmp_path / "text.pem"), str(make_key(tmp_path))
    for flags, said in (
        (["--ssl-keyfile", key], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "/no/such.pem"], "--ssl-certfile /no/such.pem can't be read: No such file"),
        (["--ssl-certfile", certificate, "--ssl-keyfile", "/no/key.pem"], "--ssl-keyfile /no/key.pem can't be read"),
        (["--ssl-certfile", certificate], f"--ssl-certfile {certificate}: "),
        (["--ssl-certfile", text, "--ssl-keyfile", key], f"--ssl-certfile {text}, --ssl-keyfile {key}: "),
        (["--ssl-certfile", certificate, "--ssl-keyfile", locked], "protected by a password"),
    ):
        assert main(["serve", model, "--load-format", "dummy", *flags]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_client_that_comes_while_the_model_loads_is_answered_over_https(tls: tuple[Path, Path]) -> None:
    listener = bind("127.0.0.1", 0)
    url = f"https://127.0.0.1:{listener.getsockname()[1]}/health"
    with listener, StartingResponder(listener, read_certificate(*map(str, tls))):
        with socket.create_connection(listener.getsockname()) as plain:
            plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in plain.recv(1000), "plain text ends neither the thread nor the server"
        answer = httpx.get(url, verify=ssl.create_default_context(cafile=tls[0]))
    assert answer.status_code == 503
    assert answer.json()["status"] == "starting"
