"""Fetching over real sockets: checked addresses, redirects, limits, TLS names, files, data URLs."""

import asyncio
import base64
import gzip
import os
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from engine.errors import RequestError
from engine.media.fetch import Fetcher, MediaOptions
from engine.media.limits import MediaLimits
from tests.engine.media.web import Web, endless, redirect, reply, silent, web

HERE = ("127.0.0.1/32",)  # 127.0.0.2 stays forbidden, and is as real
LIMITS = MediaLimits(max_bytes=1000, fetch_timeout_s=20)


class Names:
    """A resolver with fixed answers; each lookup takes the next answer of a name."""

    def __init__(self, **answers: list[list[str]]):
        self.answers = answers
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host not in self.answers:
            raise OSError("unknown")
        return self.answers[host].pop(0)


async def refusal(fetcher: Fetcher, url: str) -> str:
    with pytest.raises(RequestError) as caught:
        await fetcher.fetch(url)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
async def fetcher() -> AsyncIterator[Fetcher]:
    made = Fetcher(MediaOptions(networks=HERE, limits=LIMITS))
    yield made
    await made.close()


@pytest.fixture
async def here() -> AsyncIterator[Web]:
    async with web() as running:
        yield running


@pytest.fixture
async def forbidden() -> AsyncIterator[Web]:
    async with web("127.0.0.2") as running:
        yield running
        assert running.connections == 0


async def test_content_is_fetched_with_the_names_host_header(here: Web) -> None:
    here.answers["/a%20b?c=d"] = reply(b"content")
    names = Names(pictures=[["127.0.0.1"]])
    fetcher = Fetcher(MediaOptions(networks=HERE, limits=LIMITS), names)
    assert await fetcher.fetch(f"http://pictures:{here.port}/a%20b?c=d") == b"content"
    assert here.hosts == [f"pictures:{here.port}"]
    await fetcher.close()


async def test_private_addresses_are_refused(fetcher: Fetcher, forbidden: Web) -> None:
    port = forbidden.port
    for host in ("127.0.0.2", "2130706434", "0x7f000002", "127.2", "[::1]", "[::ffff:127.0.0.2]", "[::ffff:7f00:2]"):
        assert "not public" in await refusal(fetcher, f"http://{host}:{port}/"), host
    # The name of this machine itself is looked up by the system.
    assert "not public" in await refusal(Fetcher(MediaOptions()), f"http://localhost:{port}/")


@pytest.mark.parametrize("answer", [["127.0.0.2"], ["127.0.0.1", "127.0.0.2"], ["127.0.0.1", "fe80::1"]])
async def test_a_name_with_any_private_address_is_refused(answer: list[str], here: Web) -> None:
    fetcher = Fetcher(MediaOptions(networks=HERE, limits=LIMITS), Names(mixed=[answer]))
    assert "host 'mixed' is not fetched from" in await refusal(fetcher, f"http://mixed:{here.port}/")
    assert here.connections == 0


async def test_a_second_answer_of_a_name_is_never_used(here: Web, forbidden: Web) -> None:
    """DNS rebinding: the check sees one address, a lookup for the connection would see another."""
    names = Names(moving=[["127.0.0.1"], ["127.0.0.2"]])
    here.answers["/"] = reply(b"x")
    fetcher = Fetcher(MediaOptions(networks=HERE, limits=LIMITS), names)
    assert await fetcher.fetch(f"http://moving:{here.port}/") == b"x"
    assert names.asked == ["moving"]
    # The next fetch looks it up again, checks it again, and refuses.
    assert "not public" in await refusal(fetcher, f"http://moving:{here.port}/")
    assert forbidden.connections == 0


async def test_redirects_are_followed_and_checked(fetcher: Fetcher, here: Web, forbidden: Web) -> None:
    here.answers |= {
        "/1": redirect("/2?x"),
        "/2?x": redirect(f"http://127.0.0.1:{here.port}/3"),
        "/3": reply(b"end"),
        "/inside": redirect(f"http://127.0.0.2:{forbidden.port}/"),
        "/file": redirect("file:///etc/passwd"),
        "/data": redirect("data:,x"),
        "/loop": redirect("/loop"),
        "/bad": redirect("http://h:99999999/"),
    }
    url = f"http://127.0.0.1:{here.port}"
    assert await fetcher.fetch(f"{url}/1") == b"end"
    assert "not public" in await refusal(fetcher, f"{url}/inside")
    assert "only http(s) is followed" in await refusal(fetcher, f"{url}/file")
    assert "only http(s) is followed" in await refusal(fetcher, f"{url}/data")
    assert "redirects more than 5 times" in await refusal(fetcher, f"{url}/loop")
    assert here.paths.count("/loop") == 6
    assert "not valid" in await refusal(fetcher, f"{url}/bad")


async def test_a_list_of_domains_holds_for_redirects_too(here: Web) -> None:
    names = Names(good=[["127.0.0.1"]] * 3, other=[["127.0.0.1"]])
    options = MediaOptions(networks=HERE, domains=("Good",), limits=LIMITS)
    fetcher = Fetcher(options, names)
    here.answers |= {"/": reply(b"x"), "/out": redirect(f"http://other:{here.port}/")}
    assert await fetcher.fetch(f"http://GOOD:{here.port}/") == b"x"
    assert "not fetched from 'other': it is not among --allowed-media-domains" in await refusal(
        fetcher, f"http://good:{here.port}/out"
    )
    assert "not among" in await refusal(fetcher, f"http://good.evil:{here.port}/")
    assert "other" not in names.asked
    await fetcher.close()


async def test_domains_of_other_scripts_are_known_by_either_spelling(here: Web) -> None:
    names = Names(**{"xn--bcher-kva.test": [["127.0.0.1"]] * 2})
    fetcher = Fetcher(MediaOptions(networks=HERE, domains=("bücher.test",), limits=LIMITS), names)
    here.answers["/"] = reply(b"x")
    for host in ("bücher.test", "xn--bcher-kva.test"):
        assert await fetcher.fetch(f"http://{host}:{here.port}/") == b"x"


async def test_limits_of_size_hold_while_streaming(fetcher: Fetcher, here: Web) -> None:
    here.answers |= {
        "/fits": reply(bytes(1000)),
        "/declared": reply(b"x", Content_Length="10000000000"),
        "/streamed": endless,
        "/zipped": reply(gzip.compress(bytes(10 << 20)), Content_Encoding="gzip"),
    }
    url = f"http://127.0.0.1:{here.port}"
    assert len(await fetcher.fetch(f"{url}/fits")) == 1000
    for path in ("declared", "streamed"):
        assert "more than 1,000 bytes, the most allowed (--max-media-bytes)" in await refusal(fetcher, f"{url}/{path}")
    assert "compressed" in await refusal(fetcher, f"{url}/zipped")


async def test_slow_and_broken_servers(here: Web, unused_tcp_port: int) -> None:
    fetcher = Fetcher(MediaOptions(networks=HERE, limits=MediaLimits(fetch_timeout_s=0.2)))
    here.answers |= {
        "/slow": silent,
        "/cut": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx",
        "/odd": b"hello\r\n\r\n",
    }
    url = f"http://127.0.0.1:{here.port}"
    assert "within 0.2 s (--media-fetch-timeout)" in await refusal(fetcher, f"{url}/slow")
    assert "could not be fetched" in await refusal(fetcher, f"{url}/cut")
    assert "could not be fetched" in await refusal(fetcher, f"{url}/odd")
    assert "answers 404" in await refusal(fetcher, f"{url}/none")
    assert "could not be fetched" in await refusal(fetcher, f"http://127.0.0.1:{unused_tcp_port}/")
    assert "can't be found" in await refusal(Fetcher(MediaOptions(), Names()), "http://nobody/")
    await fetcher.close()


async def test_a_fetch_that_is_canceled_closes_its_connection(fetcher: Fetcher, here: Web) -> None:
    here.answers["/"] = silent
    fetching = asyncio.ensure_future(fetcher.fetch(f"http://127.0.0.1:{here.port}/"))
    while not here.connections:
        await asyncio.sleep(0.01)
    fetching.cancel()
    await asyncio.gather(fetching, return_exceptions=True)
    assert fetching.cancelled()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://host/x", "must begin with data:"),
        ("//host/x", "must begin with"),
        ("gopher:x", "must begin with"),
        ("http:///x", "names no host"),
        ("http://user:secret@host/x", "user name or password"),
        ("http://host:99999/", "not valid"),
        ("http://a\r\nHost: b/", "not valid"),
        ("http://h/" + "x" * 9000, "characters"),
        ("data:image/png;base64", "no comma"),
        ("data:;base64,!!!!", "base64 data is not valid"),
        ("data:;base64,é", "base64 data is not valid"),
        ("data:;base64,QQ=", "base64 data is not valid"),
        ("data:;base64," + "A" * 2000, "more than 1,000 bytes"),
        ("data:," + "A" * 2000, "more than 1,000 bytes"),
        ("data:," + "A" * 20_000, "more than 1,000 bytes"),
        ("file:///etc/passwd", "--allowed-local-media-path"),
    ],
)
async def test_urls_that_are_refused(fetcher: Fetcher, url: str, reason: str) -> None:
    found = await refusal(fetcher, url)
    assert reason in found
    assert "secret" not in found


async def test_data_urls(fetcher: Fetcher) -> None:
    content = bytes(range(256))
    coded = base64.b64encode(content).decode()
    assert await fetcher.fetch(f"data:image/png;base64,{coded}") == content
    assert await fetcher.fetch(f"DATA:;BASE64,{coded}") == content
    assert await fetcher.fetch("data:,a%20b") == b"a b"
    large = os.urandom((3 << 20) + 1)
    wide = Fetcher(MediaOptions())
    assert await wide.decode_base64(base64.b64encode(large).decode()) == large


async def test_files_below_the_folder(tmp_path: Path) -> None:
    root, outside = tmp_path / "media", tmp_path / "media-not"
    root.mkdir()
    outside.mkdir()
    (root / "a b.png").write_bytes(b"inside")
    (root / "large").write_bytes(bytes(1001))
    (outside / "secret").write_bytes(b"secret")
    (root / "link").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "own").symlink_to(root / "a b.png")
    os.mkfifo(root / "pipe")
    fetcher = Fetcher(MediaOptions(local_path=str(root), limits=LIMITS))
    assert await fetcher.fetch((root / "a b.png").as_uri()) == b"inside"
    assert await fetcher.fetch(f"file://localhost{root}/own") == b"inside"
    for path in ("link", "folder/secret", "../media-not/secret", "%2e%2e/media-not/secret", "../nothing"):
        assert "is not below the folder" in await refusal(fetcher, f"file://{root}/{path}")
    assert "more than 1,000 bytes" in await refusal(fetcher, f"file://{root}/large")
    assert "not a regular file" in await refusal(fetcher, f"file://{root}/pipe")
    assert "No such file" in await refusal(fetcher, f"file://{root}/none")
    assert "another host" in await refusal(fetcher, f"file://host{root}/own")
    assert "zero byte" in await refusal(fetcher, f"file://{root}/own%00")


async def test_tls_certificates_are_checked_against_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout",
        str(key), "-out", str(certificate), "-days", "2", "-subj", "/CN=pictures.test", "-addext",
        "subjectAltName=DNS:pictures.test",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    names = Names(**{"pictures.test": [["127.0.0.1"]] * 2, "other.test": [["127.0.0.1"]]})
    async with web(tls=tls) as running:
        running.answers["/"] = reply(b"secure")
        unknown = Fetcher(MediaOptions(networks=HERE), names)
        assert "CERTIFICATE_VERIFY_FAILED" in await refusal(unknown, f"https://pictures.test:{running.port}/")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        fetcher = Fetcher(MediaOptions(networks=HERE), names)
        assert await fetcher.fetch(f"https://pictures.test:{running.port}/") == b"secure"
        assert "CERTIFICATE_VERIFY_FAILED" in await refusal(fetcher, f"https://other.test:{running.port}/")
    assert running.paths == ["/"]
