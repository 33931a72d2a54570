"""URLs, and requests as bytes."""

import json

import pytest

from bench.errors import BenchError
from bench.loadgen.target import Target, clean_url, encode_request, resolve
from bench.workloads import RequestSpec


@pytest.mark.parametrize("url", ["http://h:8000", "http://h:8000/", "http://h:8000/v1", " http://h:8000/v1/ "])
def test_urls_are_cleaned(url: str) -> None:
    assert clean_url(url) == "http://h:8000"


@pytest.mark.parametrize("url", ["", "h:8000", "ftp://h", "http://", "http://h:x", "http://h:99999"])
def test_bad_urls_are_named(url: str) -> None:
    with pytest.raises(BenchError, match="--url"):
        clean_url(url)


def test_the_request_as_bytes() -> None:
    target = Target("http://127.0.0.1:8123/proxy/v1", "my model", "secret")
    address = resolve(target.base_url)
    data = encode_request(target, address, RequestSpec(2, 9, prompt_ids=[1, 2]))
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /proxy/v1/completions HTTP/1.1"
    assert "Host: 127.0.0.1:8123" in lines
    assert "Authorization: Bearer secret" in lines
    assert f"Content-Length: {len(body)}" in lines
    assert json.loads(body)["model"] == "my model"


def test_a_request_has_one_kind_of_prompt() -> None:
    target = Target("http://127.0.0.1:1", "m")
    for spec in (RequestSpec(1, 1), RequestSpec(1, 1, prompt_ids=[1], messages=[])):
        with pytest.raises(ValueError, match=r"either prompt_ids.* or messages"):
            encode_request(target, resolve(target.base_url), spec)


def test_host_headers() -> None:
    assert resolve("http://127.0.0.1").host_header == "127.0.0.1"
    assert resolve("https://127.0.0.1").host_header == "127.0.0.1"
    assert resolve("https://127.0.0.1:80").host_header == "127.0.0.1:80"
