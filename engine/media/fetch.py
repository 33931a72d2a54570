"""Fetching of media that requests name by URL: data:, http(s): and file:, within limits.

A server that fetches what clients name can be made to reach what only it can reach. So all addresses of a host are
checked after resolving its name, the connection is made to a checked address and not to the name (a second lookup could
answer otherwise), and each redirect is a new fetch with the same checks. TLS certificates are checked against the name.
"""

import asyncio
import binascii
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote_to_bytes

import httpcore
import httpx

from engine.errors import RequestError
from engine.media.addresses import is_allowed, parse_networks
from engine.media.limits import MediaOptions

Resolver = Callable[[str, int], Awaitable[list[str]]]

CONNECTIONS = 32  # fetches at the same time, of one API process
LOOKUPS = 8  # threads that resolve names, which may take long
PIECE = 1 << 20  # bytes decoded or read at a time, so that streams continue meanwhile
REDIRECTS = frozenset({301, 302, 303, 307, 308})
LONGEST_URL = 8192  # characters, but for data: URLs
SHOWN_URL = 100  # characters in messages
HEADERS = [(b"User-Agent", b"redline"), (b"Accept", b"*/*"), (b"Accept-Encoding", b"identity")]


class Fetcher:
    """Fetches media; lives in one event loop."""

    def __init__(self, options: MediaOptions, resolve: Resolver | None = None):
        """`resolve` replaces the system's lookup of names."""
        self.limits = options.limits
        self._root = os.path.realpath(options.local_path) if options.local_path else ""
        self._domains = frozenset(host_of(domain) for domain in options.domains)
        self._threads = ThreadPoolExecutor(LOOKUPS, thread_name_prefix="resolve")
        networks = parse_networks(options.networks)
        backend = _CheckedConnections(self._look_up if resolve is None else resolve, networks)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),  # with SSL_CERT_FILE of the environment
            max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=5.0,
            network_backend=backend,
        )  # fmt: skip
        self._places = asyncio.Semaphore(CONNECTIONS)

    async def close(self) -> None:
        await self._pool.aclose()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str) -> bytes:
        """The bytes of a URL. Raises RequestError, with the reason, if they can't be had or are too many."""
        scheme = url[:16].partition(":")[0].strip().lower()
        if scheme == "data":
            return await self.decode_data_url(url)
        if len(url) > LONGEST_URL:
            raise RequestError(f"the URL has {len(url):,} characters, but at most {LONGEST_URL:,} are allowed")
        if scheme == "file":
            return await asyncio.to_thread(self._read_file, url)
        if scheme not in ("http", "https"):
            raise RequestError(f"the URL {_shown(url)} must begin with data:, https:, http: or file:")
        timeout = self.limits.fetch_timeout_s
        async with self._places:
            try:
                return await asyncio.wait_for(self._follow(url), timeout)
            except TimeoutError as error:
                raise RequestError(
                    f"{_shown(url)} could not be fetched within {timeout:g} s (--media-fetch-timeout)"
                ) from error

    # ------------------------------------------------------------------------------------------------------- data:

    async def decode_data_url(self, url: str) -> bytes:
        """The bytes of data:TYPE;base64,… (or percent-encoded)."""
        head, comma, _ = url[:1024].partition(",")
        if not comma:
            raise RequestError("the data: URL has no comma: write it as data:image/png;base64,…")
        if head.lower().endswith(";base64"):
            return await self.decode_base64(url, len(head) + 1)
        if len(url) - len(head) > 3 * self.limits.max_bytes:
            raise self._too_large()
        found = unquote_to_bytes(url[len(head) + 1 :])
        if len(found) > self.limits.max_bytes:
            raise self._too_large()
        return found

    async def decode_base64(self, text: str, start: int = 0) -> bytes:
        """Decode base64 from a position on, in pieces. Raises RequestError if it is not valid, or too long."""
        if (len(text) - start) // 4 * 3 > self.limits.max_bytes + 2:
            raise self._too_large()
        found = bytearray()
        try:
            for at in range(start, len(text), 4 * PIECE):
                found += binascii.a2b_base64(text[at : at + 4 * PIECE], strict_mode=True)
                await asyncio.sleep(0)
        except ValueError as error:  # also for characters that are not ASCII
            raise RequestError(f"the base64 data is not valid: {str(error).lower()}") from error
        if len(found) > self.limits.max_bytes:
            raise self._too_large()
        return bytes(found)

    # ------------------------------------------------------------------------------------------------------- file:

    def _read_file(self, url: str) -> bytes:
        if not self._root:
            raise RequestError("file: URLs are not allowed on this server (--allowed-local-media-path)")
        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, ValueError) as error:
            raise RequestError(f"the URL {_shown(url)} is not valid: {error}") from error
        if parsed.host not in ("", "localhost"):
            raise RequestError(f"the URL {_shown(url)} names another host: write file:///folder/file")
        raw = unquote_to_bytes(parsed.raw_path.partition(b"?")[0])
        if b"\0" in raw:
            raise RequestError(f"the URL {_shown(url)} is not valid: its path has a zero byte")
        path = os.path.realpath(os.fsdecode(raw))
        # The same answer for all files outside, whether they exist or not.
        if not _is_below(path, self._root):
            raise RequestError(f"{_shown(url)} is not below the folder that --allowed-local-media-path names")
        try:
            return self._read_regular(path, url)
        except OSError as error:
            raise RequestError(f"{_shown(url)} can't be read: {error.strerror}") from error

    def _read_regular(self, path: str, url: str) -> bytes:
        # A link that replaces the file or one of its folders after the check leads elsewhere: the file that was opened
        # is checked again, where the system can tell.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            known = f"/proc/self/fd/{descriptor}"
            if os.path.exists(known) and not _is_below(os.path.realpath(known), self._root):
                raise RequestError(f"{_shown(url)} is not below the folder that --allowed-local-media-path names")
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise RequestError(f"{_shown(url)} is not a regular file")
            data = file.read(self.limits.max_bytes + 1)
        if len(data) > self.limits.max_bytes:
            raise self._too_large()
        return data

    # ---------------------------------------------------------------------------------------------------- http(s):

    async def _follow(self, url: str) -> bytes:
        """Fetch a URL and its redirects."""
        current = self._parse(url)
        for _ in range(self.limits.max_redirects + 1):
            found = await self._get(current)
            if isinstance(found, bytes):
                return found
            try:
                current = self._parse(str(current.join(found)))
            except (httpx.InvalidURL, ValueError) as error:
                raise RequestError(f"{_shown(url)} redirects to a URL that is not valid") from error
        raise RequestError(f"{_shown(url)} redirects more than {self.limits.max_redirects} times")

    def _parse(self, url: str) -> httpx.URL:
        try:
            parsed = httpx.URL(url)
            host = parsed.raw_host.decode("ascii").lower().rstrip(".")
        except (httpx.InvalidURL, ValueError) as error:
            raise RequestError(f"the URL {_shown(url)} is not valid: {error}") from error
        if parsed.scheme not in ("http", "https"):
            raise RequestError(f"a redirect leads to a {parsed.scheme or 'relative'} URL: only http(s) is followed")
        if parsed.port is not None and not 0 < parsed.port < 1 << 16:
            raise RequestError(f"the URL {_shown(url)} is not valid: its port must lie in 1..65535")
        if not host:
            raise RequestError(f"the URL {_shown(url)} names no host")
        if parsed.userinfo:
            raise RequestError("a URL with a user name or password is not fetched")
        if self._domains and host not in self._domains:
            raise RequestError(f"media are not fetched from {host!r}: it is not among --allowed-media-domains")
        return parsed

    async def _get(self, url: httpx.URL) -> bytes | str:
        """The content of a URL, or the URL it redirects to."""
        timeout = self.limits.fetch_timeout_s
        extensions: dict[str, Any] = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), timeout)}
        host = b"[%b]" % url.raw_host if b":" in url.raw_host else url.raw_host
        headers = [(b"Host", host if url.port is None else b"%b:%d" % (host, url.port)), *HEADERS]
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        try:
            async with self._pool.stream("GET", target, headers=headers, extensions=extensions) as answer:
                known = {name.lower(): value for name, value in answer.headers}
                if answer.status in REDIRECTS and b"location" in known:
                    return known[b"location"].decode("latin-1")
                if answer.status != 200:
                    raise RequestError(f"{_shown(str(url))} could not be fetched: it answers {answer.status}")
                return await self._content(answer, known)
        except httpcore.TimeoutException as error:
            raise TimeoutError from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
            raise RequestError(f"{_shown(str(url))} could not be fetched: {_reason(error)}") from error

    async def _content(self, answer: httpcore.Response, known: dict[bytes, bytes]) -> bytes:
        if known.get(b"content-encoding", b"identity").lower() != b"identity":
            raise RequestError("the answer is compressed although that was not asked for; it is not decompressed here")
        declared = known.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self.limits.max_bytes:
            raise self._too_large()
        data = bytearray()
        async for piece in answer.aiter_stream():
            data += piece
            if len(data) > self.limits.max_bytes:
                raise self._too_large()
        return bytes(data)

    async def _look_up(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        kinds = {"type": socket.SOCK_STREAM, "proto": socket.IPPROTO_TCP}
        found = await loop.run_in_executor(self._threads, lambda: socket.getaddrinfo(host, port, **kinds))
        return list(dict.fromkeys(str(entry[4][0]) for entry in found))

    def _too_large(self) -> RequestError:
        return RequestError(f"it has more than {self.limits.max_bytes:,} bytes, the most allowed (--max-media-bytes)")


class _CheckedConnections(httpcore.AsyncNetworkBackend):
    """Connects to hosts whose addresses are all allowed, without resolving their names a second time."""

    def __init__(self, resolve: Resolver, networks: Iterable[Any]):
        self._resolve = resolve
        self._networks = tuple(networks)
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            raise RequestError(f"the host {host!r} can't be found") from error
        # The message doesn't tell the address: clients shall not learn names of the server's network.
        if not all(is_allowed(address, self._networks) for address in addresses):
            raise RequestError(
                f"the host {host!r} is not fetched from: it has an address that is not public "
                "(--allowed-media-networks)"
            )
        failure: Exception = httpcore.ConnectError(f"the host {host!r} has no address")
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except httpcore.ConnectError as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def host_of(domain: str) -> str:
    """A host of --allowed-media-domains as URLs have it: in lower case, other scripts in ASCII (IDNA)."""
    return httpx.URL(f"http://{domain.strip()}").raw_host.decode("ascii").lower().rstrip(".")


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath((path, root)) == root


def _shown(url: str) -> str:
    """A URL for a message, shortened."""
    text = "".join(character if character.isprintable() else "?" for character in url)
    return repr(text if len(text) <= SHOWN_URL else text[: SHOWN_URL - 1] + "…")


def _reason(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text or type(error).__name__
