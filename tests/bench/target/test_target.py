"""URLs, what a target says of requests, and requests as bytes."""

import base64
import json
import ssl
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BenchError
from bench.loadgen.request import encode_request, resolve
from bench.target.control import unused_proxy
from bench.target.target import Target, clean_url
from bench.target.tls import tls_context
from bench.workloads import RequestSpec

IDS = RequestSpec(2, 9, prompt_ids=[1, 2])


def sent(target: Target, spec: RequestSpec = IDS) -> tuple[list[str], dict[str, Any]]:
    """The lines of the head of a request, and its body."""
    head, _, body = encode_request(target, resolve(target), spec).partition(b"\r\n\r\n")
    return head.decode("latin-1").split("\r\n"), json.loads(body)


@pytest.mark.parametrize(
    "url",
    [
        "http://h:8000", "http://h:8000/", "http://h:8000/v1", " http://h:8000/v1/ ", "HTTP://H:8000/v1",
        "http://h:8000/v1/chat/completions", "http://h:8000/v1/completions/", "http://h:8000/v1/models",
        "http://me:secret@h:8000/v1", "http://h:8000/v1?a=b", "http://h:8000/v1#part",
    ],
)  # fmt: skip
def test_urls_are_cleaned(url: str) -> None:
    assert clean_url(url) == "http://h:8000"


def test_base_paths_stay() -> None:
    assert clean_url("https://h/team a/llm/v1/") == "https://h/team%20a/llm"
    assert clean_url("http://[::1]:80/x") == "http://[::1]:80/x"
    assert clean_url("http://bücher.example/v1") == "http://xn--bcher-kva.example"


@pytest.mark.parametrize(
    "url",
    ["", "h:8000", "ftp://h", "http://", "http://h:x", "http://h:99999", "http://h:0", "http://a b", "http://a\x00b"],
)
def test_bad_urls_are_named(url: str) -> None:
    with pytest.raises(BenchError, match="--url"):
        clean_url(url)
    with pytest.raises(BenchError, match="--url"):
        Target(url, "m")


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(BenchError) as caught:
        Target("http://me:secret@h:x")
    assert "secret" not in str(caught.value)


def test_the_request_as_bytes() -> None:
    lines, body = sent(Target("http://127.0.0.1:8123/proxy/v1", "my model", "secret"))
    assert lines[0] == "POST /proxy/v1/completions HTTP/1.1"
    assert "Host: 127.0.0.1:8123" in lines
    assert "Authorization: Bearer secret" in lines
    assert "Accept-Encoding: identity" in lines
    assert body == {
        "model": "my model", "prompt": [1, 2], "max_tokens": 9, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    data = encode_request(Target("http://127.0.0.1:1", "m"), resolve("http://127.0.0.1:1"), IDS)
    assert int(data.split(b"Content-Length: ")[1].split(b"\r\n")[0]) == len(data.partition(b"\r\n\r\n")[2])


def test_queries_and_users_of_the_url_are_sent() -> None:
    target = Target("http://me:p%40ss@127.0.0.1:1/x/v1?api-version=2024-10-01", "m")
    assert target.base_url == "http://127.0.0.1:1/x"
    assert target.url("/v1/models") == "http://127.0.0.1:1/x/v1/models?api-version=2024-10-01"
    lines, _ = sent(target)
    assert lines[0] == "POST /x/v1/completions?api-version=2024-10-01 HTTP/1.1"
    assert f"Authorization: Basic {base64.b64encode(b'me:p@ss').decode()}" in lines
    assert "Authorization: Bearer k" in sent(Target("http://me:p@127.0.0.1:1", "m", "k"))[0]


def test_headers_are_sent_and_replace_others() -> None:
    given = (("X-Team", "a: b"), ("accept-encoding", "gzip"), ("AUTHORIZATION", "Token é"))
    lines, _ = sent(Target("http://127.0.0.1:1", "m", "key", headers=given))
    assert {"X-Team: a: b", "accept-encoding: gzip", "AUTHORIZATION: Token é"} <= set(lines)
    assert sum(line.lower().startswith(("accept-encoding", "authorization")) for line in lines) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X\r\nY", "a"),
        ("", "a"),
        ("X Y", "a"),
        ("X", "a\r\nB: c"),
        ("X", "日"),
        ("Content-Length", "1"),
        ("X", "a\x7f"),
    ],
)
def test_header_fields_that_can_not_be_sent(name: str, value: str) -> None:
    with pytest.raises(BenchError, match="--header"):
        Target("http://h", "m", headers=((name, value),))


@pytest.mark.parametrize("key", ["", "  ", "a\nb", "kéy日"])
def test_keys_that_can_not_be_sent(key: str) -> None:
    with pytest.raises(BenchError, match="--api-key") as caught:
        Target("http://h", "m", key)
    assert not key.strip() or key not in str(caught.value)


def test_strict_servers() -> None:
    target = Target(
        "http://127.0.0.1:1", "m", extra_body={"top_k": 1, "temperature": None, "max_tokens": 5},
        ignore_eos=False, stream_options=False,
    )  # fmt: skip
    assert sent(target)[1] == {"model": "m", "prompt": [1, 2], "max_tokens": 5, "stream": True, "top_k": 1}
    assert not target.fixes_lengths
    assert Target("http://h", ignore_eos=False, extra_body={"ignore_eos": True}).fixes_lengths
    for name in ("stream", "prompt", "messages", "model"):
        with pytest.raises(BenchError, match="--extra-body"):
            Target("http://h", "m", extra_body={name: 1})


def test_what_result_files_say_holds_no_secrets() -> None:
    target = Target(
        "http://a:b@h", "m", "key", (("X-Key", "secret"),), insecure=True,
        extra_body={"top_k": 1, "user_key": "secret"},
    )  # fmt: skip
    assert target.described() == {"headers": ["X-Key"], "extra_body": {"top_k": 1, "user_key": "***"}, "insecure": True}
    assert Target("http://h", "m", "key").described() == {}


def test_a_request_has_one_kind_of_prompt() -> None:
    target = Target("http://127.0.0.1:1", "m")
    for spec in (RequestSpec(1, 1), RequestSpec(1, 1, prompt_ids=[1], messages=[])):
        with pytest.raises(ValueError, match=r"either prompt_ids.* or messages"):
            encode_request(target, resolve(target), spec)


def test_host_headers() -> None:
    assert resolve("http://127.0.0.1").host_header == "127.0.0.1"
    assert resolve("https://127.0.0.1").host_header == "127.0.0.1"
    assert resolve("https://127.0.0.1:80").host_header == "127.0.0.1:80"


def test_which_certificates_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    assert tls_context().verify_mode is ssl.CERT_REQUIRED
    loose = tls_context(insecure=True)
    assert (loose.verify_mode, loose.check_hostname) == (ssl.CERT_NONE, False)
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("hello")
    for path in (wrong, tmp_path / "missing.pem"):
        with pytest.raises(BenchError, match=rf"{path.name} cannot be read as certificates.*\(--ca\)"):
            tls_context(str(path))
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        with pytest.raises(BenchError, match=rf"{path.name} cannot be read as certificates.*\(SSL_CERT_FILE\)"):
            tls_context()


def test_a_proxy_of_the_environment_is_said_to_be_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert unused_proxy(Target("http://h:1")) == ""
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy:3128")
    monkeypatch.setenv("NO_PROXY", "inside.example,10.0.0.1:8000")
    said = unused_proxy(Target("https://h"))
    assert said.startswith("HTTPS_PROXY is ignored")
    assert "secret" not in said
    assert unused_proxy(Target("http://h")) == ""
    assert unused_proxy(Target("https://x.inside.example")) == ""
    monkeypatch.setenv("ALL_PROXY", "socks5://proxy")
    assert unused_proxy(Target("http://h")).startswith("ALL_PROXY is ignored")
    assert unused_proxy(Target("http://10.0.0.1:8000")) == ""
