"""Hostile media over real sockets: right or refused with a reason, memory stays flat, others are undisturbed."""

import asyncio
import base64
import contextlib
import io
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from engine.api.http_options import HttpOptions, Limits
from engine.api.http_server import HttpServer
from engine.api.ports import bind
from engine.media.limits import MediaLimits, MediaOptions
from tests.engine.api.conftest import InLoop, in_loop
from tests.engine.api.test_media import CHAT, RED, data_url, image, text, tokens_of_image, user
from tests.engine.api.tiny_processor import EMBEDDING, SPEC, tokens_of
from tests.engine.media.make_images import chunk, encode, noise, png, png_header, text_bomb
from tests.engine.media.test_audio import TONE, float_wav
from tests.engine.media.web import Web, endless, redirect, reply, silent, web

pytestmark = pytest.mark.usefixtures("light_processes")

RGB = Image.fromarray(noise())
MIB = 1 << 20
# Public names of the test resolve to these; 127.0.0.2 is a real host that must never be reached.
NAMES = {"pictures.example": "127.0.0.1", "inside.example": "127.0.0.2"}
OPTIONS = HttpOptions(
    limits=Limits(max_body_bytes=4 * MIB),
    media=MediaOptions(networks=("127.0.0.1/32",), limits=MediaLimits(max_bytes=2 * MIB, fetch_timeout_s=10)),
)


async def resolve(host: str, port: int) -> list[str]:
    return [NAMES.get(host, host)]


@dataclass
class Served:
    """A server on a real socket, and a web server from which it may fetch."""

    inner: InLoop
    http: httpx.AsyncClient
    port: int
    pictures: Web
    forbidden: Web

    def url(self, path: str, host: str = "pictures.example") -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": f"http://{host}:{self.pictures.port}{path}"}}

    async def refusal(self, *parts: Any, status: int = 400) -> str:
        answer = await self.http.post(CHAT, json=user(text("?"), *parts))
        assert answer.status_code == status, answer.text
        error: dict[str, str] = answer.json()["error"]
        assert error["param"].startswith("messages[0].content[1]")
        return error["message"]

    async def tokens(self, *parts: Any) -> list[int]:
        answer = await self.http.post(CHAT, json=user(*parts) | {"return_token_ids": True})
        assert answer.status_code == 200, answer.text
        found: list[int] = answer.json()["prompt_token_ids"]
        return found


@contextlib.asynccontextmanager
async def serving(options: HttpOptions = OPTIONS) -> AsyncIterator[Served]:
    async with (
        in_loop(options, mm=SPEC, resolve=resolve, max_model_len=512) as inner,
        web() as pictures,
        web("127.0.0.2", port=pictures.port) as forbidden,
    ):
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        side = HttpServer(inner.state, listener)
        up = asyncio.Event()
        running = asyncio.ensure_future(side.serve(lambda _url: up.set()))
        await up.wait()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield Served(inner, http, port, pictures, forbidden)
        assert forbidden.connections == 0
        side.end(0)
        await running


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as running:
        yield running


def peak(process: int) -> int:
    """The most memory that a process has had since the last `reset_peak`, in bytes."""
    with open(f"/proc/{process}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024


def reset_peak(process: int) -> int:
    with open(f"/proc/{process}/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
    return peak(process)


def sound(data: bytes) -> dict[str, Any]:
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def animated() -> bytes:
    frames = [Image.fromarray(noise(seed=seed)) for seed in range(3)]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:])


SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"
NAN = float_wav(np.where(np.arange(len(TONE)) == 5, np.nan, TONE).astype(np.float32))
HOSTILE: dict[str, tuple[Any, str]] = {
    "100k x 100k in the header": (image(png_header(100_000, 100_000) + chunk(b"IDAT", b"")), "--max-image-pixels"),
    "truncated JPEG": (image(encode(RGB, "JPEG")[:-200]), "truncated"),
    "SVG": (image(SVG), "looks like SVG"),
    "zip bomb in a text chunk": (image(png(noise(), text_bomb(300))), "Decompressed data too large"),
    "animated GIF": (image(animated()), "animated (3 frames)"),
    "empty": (image(b""), "empty"),
    "no base64": ({"type": "image_url", "image_url": {"url": "data:image/png;base64,?"}}, "base64"),
    "too many bytes": (image(bytes(2 * MIB + 1)), "--max-media-bytes"),
    "a local file": ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "--allowed-local-media-path"),
    "another scheme": ({"type": "image_url", "image_url": {"url": "gopher://x/"}}, "must begin with"),
    "NaN": (sound(NAN), "not finite"),
    "no samples": (sound(float_wav(TONE[:0])), "no samples"),
    "no sound": (sound(b"RIFF"), "can't be decoded"),
    "a playlist as a video": (
        {"type": "video_url", "video_url": {"url": data_url(b"#EXTM3U\nhttp://127.0.0.2/x.ts\n", "video/mp4")}},
        "accepted are MP4",
    ),
}


async def test_hostile_inputs_are_refused_and_others_undisturbed(served: Served) -> None:
    good = user(text("?"), image(RED)) | {"return_token_ids": True}
    expected = (await served.http.post(CHAT, json=good)).json()["prompt_token_ids"]
    assert served.inner.client.inputs is not None
    [worker] = served.inner.client.inputs._pool.pids  # type: ignore[attr-defined]
    before = {process: reset_peak(process) for process in (worker, os.getpid())}
    served.pictures.answers |= {
        "/inside": redirect(f"http://inside.example:{served.forbidden.port}/"),
        "/address": redirect(f"http://127.0.0.2:{served.forbidden.port}/"),
        "/loop": redirect("/loop"),
        "/endless": endless,
    }
    hostile = dict(HOSTILE) | {
        "redirect to a name inside": (served.url("/inside"), "not public"),
        "redirect to an address inside": (served.url("/address"), "not public"),
        "name that resolves inside": (served.url("/", "inside.example"), "not public"),
        "redirects without end": (served.url("/loop"), "redirects more than"),
        "content without end": (served.url("/endless"), "--max-media-bytes"),
    }
    for _ in range(2):
        jobs = [served.refusal(part) for part, _ in hostile.values()]
        others = [served.http.post(CHAT, json=good) for _ in range(5)]
        texts = [served.http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 3}) for _ in range(5)]
        messages, answers, written = await asyncio.gather(
            asyncio.gather(*jobs), asyncio.gather(*others), asyncio.gather(*texts)
        )
        for (name, (_, reason)), message in zip(hostile.items(), messages, strict=True):
            assert reason in message, f"{name}: {message}"
        assert [answer.json()["prompt_token_ids"] for answer in answers] == [expected] * 5
        assert all(answer.json()["usage"]["completion_tokens"] == 3 for answer in written)
    assert served.inner.client.inputs._pool.pids == [worker], "no process has died"  # type: ignore[attr-defined]
    # A video loads FFmpeg's libraries; a picture of 100,000 x 100,000 or an inflated chunk would take far more.
    assert all(peak(process) - before[process] < 160 * MIB for process in before)
    served.inner.client.inputs.cache.check()


async def test_unusual_images_have_pils_values(served: Served) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = np.random.default_rng(1).integers(0, 1 << 16, (24, 40), dtype=np.uint16)
    cases = {
        "CMYK": encode(RGB.convert("CMYK"), "JPEG"),
        "alpha": encode(Image.fromarray(noise(bands=4), "RGBA"), "PNG"),
        "palette": encode(RGB.quantize(16), "PNG", transparency=3),
        "1x1": encode(Image.new("RGB", (1, 1), "red"), "PNG"),
        "1x10000": encode(Image.new("RGB", (1, 10_000), "red"), "PNG"),
        "GIF": encode(RGB, "GIF"),
        "BMP": encode(RGB, "BMP"),
        "WebP": encode(RGB, "WEBP"),
    }
    for name, data in cases.items():
        assert await served.tokens(image(data)) == [*b"u:", *tokens_of_image(data), *b";"], name
    turned = tokens_of("image", np.asarray(RGB.transpose(Image.Transpose.ROTATE_270)))
    assert await served.tokens(image(encode(RGB, "JPEG", exif=exif.tobytes(), quality=95))) != turned
    assert await served.tokens(image(encode(RGB, "PNG", exif=exif.tobytes()))) == [*b"u:", *turned, *b";"]
    color = np.asarray(Image.open(io.BytesIO(png(np.repeat(wide[..., None], 3, axis=2)))))
    assert await served.tokens(image(png(wide))) == [*b"u:", *tokens_of("image", color), *b";"]


async def test_images_are_fetched_from_public_names(served: Served) -> None:
    served.pictures.answers |= {"/a": redirect("/b"), "/b": reply(RED)}
    assert await served.tokens(served.url("/a")) == await served.tokens(image(RED))
    assert set(served.pictures.hosts) == {f"pictures.example:{served.pictures.port}"}


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_of_ten_gigabytes_is_refused_early(served: Served, declared: bool) -> None:
    before = reset_peak(os.getpid())
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    length = b"content-length: 10000000000" if declared else b"transfer-encoding: chunked"
    writer.write(
        b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n%b\r\n\r\n" % (CHAT.encode(), length)
    )
    answered = asyncio.ensure_future(reader.readuntil(b"\r\n\r\n"))
    start = b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:;base64,'
    sent, piece = 0, b"A" * (1 << 16)
    with contextlib.suppress(ConnectionError):
        for data in (start, *[piece] * 1000):
            if answered.done():
                break
            writer.write(data if declared else b"%x\r\n%b\r\n" % (len(data), data))
            await asyncio.wait_for(writer.drain(), 20)
            sent += len(data)
            await asyncio.sleep(0)
    assert (await asyncio.wait_for(answered, 20)).startswith(b"HTTP/1.1 413 ")
    assert sent < 32 * MIB
    writer.close()
    assert peak(os.getpid()) - before < 64 * MIB
    assert (await served.http.get("/health")).status_code == 200


async def test_a_client_that_leaves_cancels_its_fetch(served: Served) -> None:
    served.pictures.answers["/"] = silent
    asking = asyncio.ensure_future(served.http.post(CHAT, json=user(served.url("/"))))
    while not served.pictures.paths:
        await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait_for(served.pictures.left.wait(), 20)
    assert EMBEDDING in await served.tokens(image(RED))
