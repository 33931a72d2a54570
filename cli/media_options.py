"""Options of `redline serve` for images, audio and video in requests."""

from typing import Any

import click

from cli.options import SIZE, Finite, option
from engine.media.limits import MediaLimits

MULTIMODAL = "Multimodal inputs"
LIMITS = MediaLimits()
# Names of options, by the field of MediaLimits.
LIMIT_OPTIONS = {
    "max_bytes": "max_media_bytes",
    "max_image_pixels": "max_image_pixels",
    "max_seconds": "max_media_seconds",
    "fetch_timeout_s": "media_fetch_timeout",
    "video_frames": "video_frames",
}


def take_media_limits(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Take the limits of media out of `settings`; None if all are the defaults."""
    given = {name: settings.pop(option_name) for name, option_name in LIMIT_OPTIONS.items()}
    changed = {name: value for name, value in given.items() if value != getattr(LIMITS, name)}
    return changed or None


MEDIA_OPTIONS = (
    option(
        MULTIMODAL, "--limit-mm-per-prompt", metavar="KIND=N,…", default_text="no limit",
        help="Maximum number of inputs of a prompt, such as image=4,video=1 or JSON. With 0, inputs of that kind are "
        "refused.",
    ),
    option(
        MULTIMODAL, "--allowed-local-media-path", metavar="FOLDER", default_text="none",
        help="Folder from which requests may read files by file: URLs. Links that lead out of it are refused.",
    ),
    option(
        MULTIMODAL, "--allowed-media-domains", multiple=True, several=True, metavar="HOST…", default_text="all",
        help="Hosts that URLs of media may name. Redirects to other hosts are refused.",
    ),
    option(
        MULTIMODAL, "--allowed-media-networks", multiple=True, several=True, metavar="NETWORK…", default_text="none",
        help="Networks from which media may be fetched although their addresses are not public, such as 10.1.0.0/16.",
    ),
    option(
        MULTIMODAL, "--max-media-bytes", type=SIZE, metavar="SIZE", default=LIMITS.max_bytes,
        default_text=f"{LIMITS.max_bytes >> 20}MiB",
        help="Maximum size of an image, sound or video, as sent or fetched.",
    ),
    option(
        MULTIMODAL, "--max-image-pixels", type=SIZE, metavar="N", default=LIMITS.max_image_pixels,
        help="Maximum number of pixels of an image or a frame, checked before it is decoded.",
    ),
    option(
        MULTIMODAL, "--max-media-seconds", type=Finite(0, min_open=True), metavar="SECONDS", default=LIMITS.max_seconds,
        help="Maximum duration of a sound or a video.",
    ),
    option(
        MULTIMODAL, "--media-fetch-timeout", type=Finite(0, min_open=True), metavar="SECONDS",
        default=LIMITS.fetch_timeout_s,
        help="Maximum time to fetch a URL, with its redirects.",
    ),
    option(
        MULTIMODAL, "--video-frames", type=click.IntRange(1), metavar="N", default=LIMITS.video_frames,
        help="Maximum number of frames that are taken of a video, evenly spaced.",
    ),
)  # fmt: skip
