"""Decoding of videos with FFmpeg (PyAV): evenly spaced frames of bytes that a client sent, within limits."""

import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, RequestError
from engine.media.limits import MediaLimits
from engine.media.types import Video

# FFmpeg's names of container formats. Playlists (hls, dash, concat) are left out: they name further files and URLs.
FORMATS = ("mp4", "mov", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv")
SHOWN_FORMATS = "MP4, MOV, MKV, WebM, AVI, MPEG-TS, MPEG, OGG and FLV"
EXTRA = "pip install 'redline-llm[video]'"


def decode_video(data: bytes, limits: MediaLimits) -> Video:
    """Decode evenly spaced frames of a video, the first and the last among them, at most `limits.video_frames`.

    Frames are counted by decoding, since headers may be wrong: a first pass counts them, a second one converts those
    that are taken.

    Args:
        data: the file.
        limits: frames to take, seconds, frames to decode and pixels.

    Raises:
        RequestError: the format isn't accepted, a limit is exceeded, or there is no picture in it.
        ConfigError: the library isn't installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"videos are decoded by av, which isn't installed: {EXTRA}") from error
    if not data:
        raise RequestError("the video is empty (0 bytes)")
    deadline = time.process_time() + limits.max_decode_s
    try:
        total = sum(1 for _ in _frames(data, limits, deadline))
        if not total:
            raise RequestError("the video has no frames")
        wanted = np.linspace(0, total - 1, min(limits.video_frames, total)).round().astype(int)
        return _take(data, total, wanted, limits, deadline)
    except RequestError:
        raise
    except av.FFmpegError as error:
        raise RequestError(f"the video can't be decoded: {error.strerror}; accepted are {SHOWN_FORMATS}") from error
    except MemoryError as error:
        raise RequestError("the video can't be decoded: out of memory") from error
    except Exception as error:  # of a damaged file
        raise RequestError(f"the video can't be decoded: {error}") from error


def _take(data: bytes, total: int, wanted: NDArray[Any], limits: MediaLimits, deadline: float) -> Video:
    pictures: list[NDArray[np.uint8]] = []
    times: list[float] = []
    chosen = set(wanted.tolist())
    for number, frame in enumerate(_frames(data, limits, deadline)):
        if number not in chosen:
            continue
        if pictures and (frame.height, frame.width) != pictures[0].shape[:2]:
            height, width = pictures[0].shape[:2]
            frame = frame.reformat(width=width, height=height)  # the size of a video may change
        pictures.append(frame.to_ndarray(format="rgb24"))
        times.append(float(frame.time or 0.0))
    # The last frame is shown as long as the others.
    seconds = (times[-1] - times[0]) * total / (total - 1) if total > 1 and len(times) > 1 else 0.0
    return Video(np.stack(pictures), np.array(times), seconds)


def _frames(data: bytes, limits: MediaLimits, deadline: float) -> Iterator[Any]:
    """The decoded frames, checked against the limits; `deadline` in CPU time of this process."""
    import av

    # Checked by FFmpeg before it reads more than the first bytes; no format may open a file or a connection.
    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
    with av.open(io.BytesIO(data), "r", metadata_errors="ignore", options=options) as container:
        if not container.streams.video:
            raise RequestError("the video has no pictures, only other streams")
        stream = container.streams.video[0]
        seconds = (container.duration or 0) / av.time_base
        if seconds > limits.max_seconds:
            raise _too_long(seconds, limits)
        _check_size(stream.codec_context.width, stream.codec_context.height, limits)
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1  # the pool has a process per core
        for number, frame in enumerate(container.decode(stream), 1):
            if number > limits.max_decoded_frames:
                raise RequestError(f"the video has more than {limits.max_decoded_frames:,} frames, the most accepted")
            if time.process_time() > deadline:
                raise RequestError(
                    f"decoding the video takes more than {limits.max_decode_s:g} s: send it shorter or smaller"
                )
            if frame.time is not None and frame.time > limits.max_seconds:
                raise _too_long(frame.time, limits)
            _check_size(frame.width, frame.height, limits)
            yield frame


def _check_size(width: int, height: int, limits: MediaLimits) -> None:
    if max(width, height) > limits.max_image_side:
        raise RequestError(
            f"the video has {width:,} x {height:,} pixels: a side may have at most {limits.max_image_side:,}"
        )
    if width * height > limits.max_image_pixels:
        raise RequestError(
            f"the video has {width:,} x {height:,} pixels, but at most {limits.max_image_pixels:,} are allowed "
            "(--max-image-pixels)"
        )
    if width * height * limits.video_frames > limits.max_kept_pixels:
        raise RequestError(
            f"the video has {width:,} x {height:,} pixels: {limits.video_frames} frames of them are more than "
            f"{limits.max_kept_pixels:,} pixels in all (fewer --video-frames)"
        )


def _too_long(seconds: float, limits: MediaLimits) -> RequestError:
    return RequestError(
        f"the video takes {seconds:,.1f} s, but at most {limits.max_seconds:g} s are allowed (--max-media-seconds)"
    )
