"""Videos: evenly spaced frames, limits, reasons for what is refused."""

import io
import socket
from typing import Any

import av
import numpy as np
import pytest

from engine.errors import RequestError
from engine.media.limits import MediaLimits
from engine.media.video import decode_video

LIMITS = MediaLimits()


def encode(levels: list[int], *, size: tuple[int, int] = (32, 24), kind: str = "mp4", rate: int = 10) -> bytes:
    """A video whose frames are grey, of the given levels."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream: Any = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def refusal(data: bytes, limits: MediaLimits = LIMITS) -> str:
    with pytest.raises(RequestError) as caught:
        decode_video(data, limits)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi"])
def test_frames_are_evenly_spaced_with_first_and_last(kind: str) -> None:
    levels = list(range(20, 230, 10))  # 21 frames
    found = decode_video(encode(levels, kind=kind), MediaLimits(video_frames=5))
    assert found.frames.shape == (5, 24, 32, 3)
    np.testing.assert_allclose(found.frames.mean(axis=(1, 2, 3)), levels[::5], atol=4)
    np.testing.assert_allclose(found.times - found.times[0], [0, 0.5, 1, 1.5, 2], atol=0.02)


def test_a_short_video_is_taken_whole() -> None:
    found = decode_video(encode([50, 100, 200]), LIMITS)
    np.testing.assert_allclose(found.frames.mean(axis=(1, 2, 3)), [50, 100, 200], atol=4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"no video" * 50, "can't be decoded"),
        (encode([1, 2, 3])[:200], "the video has no pictures"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "can't be decoded"),
    ],
)
def test_what_is_no_video_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    assert reason in refusal(data)


def test_a_playlist_connects_to_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/x.ts"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n"
        assert "accepted are MP4" in refusal(playlist.encode())
        with pytest.raises(BlockingIOError):
            server.accept()


def test_limits() -> None:
    data = encode([10] * 30)
    assert "takes 3.0 s, but at most 2 s are allowed (--max-media-seconds)" in refusal(data, MediaLimits(max_seconds=2))
    assert "more than 20 frames" in refusal(data, MediaLimits(max_decoded_frames=20))
    assert "(--max-image-pixels)" in refusal(data, MediaLimits(max_image_pixels=100))
    assert "decoding the video takes more than" in refusal(data, MediaLimits(max_decode_s=-1))
    assert "(fewer --video-frames)" in refusal(data, MediaLimits(max_kept_pixels=32 * 24 * 8))
