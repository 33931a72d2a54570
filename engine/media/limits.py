"""The limits of media in requests: what a client may make the server fetch and decode."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.errors import ConfigError
from engine.media.addresses import parse_networks

KINDS = ("image", "audio", "video")
LIMIT_FLAG = "--limit-mm-per-prompt"


class MediaLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one image, sound or video. The error of one that exceeds a limit names the flag, or says it is fixed.

    Sizes in memory follow from them: an image needs three bytes a pixel, a sound four bytes a sample, a video three
    bytes for each pixel of the frames that are kept.
    """

    # Flags of the server.
    max_bytes: int = 64 << 20  # as sent or fetched; --max-media-bytes
    max_image_pixels: int = 64 << 20  # --max-image-pixels
    max_seconds: float = 1800.0  # of a sound or a video; --max-media-seconds
    fetch_timeout_s: float = 10.0  # of one URL with its redirects; --media-fetch-timeout
    video_frames: int = 32  # frames taken of a video, evenly spaced; --video-frames

    # Fixed.
    max_image_side: int = 32_768  # pixels
    max_redirects: int = 5
    max_samples: int = 1800 * 48_000  # of a sound, after mixing to mono
    max_channels: int = 64
    max_decode_s: float = 60.0  # of CPU time, of a video
    max_decoded_frames: int = 30_000  # of a video; all frames up to the last one that is taken are decoded
    max_kept_pixels: int = 256 << 20  # of the frames that are kept of a video, together


class MediaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where media of requests may come from, and their limits.

    Args:
        local_path: folder below which file: URLs may read; empty: none may.
        domains: hosts that http(s) URLs may name; empty: all.
        networks: networks whose addresses may be fetched from although they are not public, e.g. 10.1.0.0/16.
        limits: of fetching and decoding.
    """

    local_path: str = ""
    domains: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    limits: MediaLimits = MediaLimits()

    def check(self) -> None:
        """Raise ConfigError for an option that is not valid."""
        parse_networks(self.networks)
        for domain in self.domains:
            if not domain.strip() or re.search(r"[\s/@:%?#]", domain.strip()):
                raise ConfigError(f"--allowed-media-domains: {domain!r} is not a host; write it as media.example.com")
        if self.local_path and not Path(self.local_path).is_dir():
            raise ConfigError(f"--allowed-local-media-path: {self.local_path!r} is not a folder")
        for name, value in msgspec.structs.asdict(self.limits).items():
            if not value > 0:
                raise ConfigError(f"the limit {name} of media must be above 0, not {value}")


def make_limits(given: Mapping[str, Any]) -> MediaLimits:
    """Limits from some of their fields. Raises ConfigError for a field that there is not."""
    for name in given:
        if name not in MediaLimits.__struct_fields__:
            known = ", ".join(MediaLimits.__struct_fields__)
            raise ConfigError(f"media_limits has no field {name!r}; it has {known}")
    return MediaLimits(**given)


def parse_per_prompt(given: str | Mapping[str, Any] | None) -> dict[str, int]:
    """The most inputs of a prompt by kind, in the spellings of vLLM; kinds that are not named have no limit.

    Args:
        given: `image=4`, `image=4,video=1`, JSON such as {"image": 4}, {"video": {"count": 1}}, or the object itself.

    Raises:
        ConfigError: the text can't be read, or names an unknown kind or a negative number.
    """
    if not given:
        return {}
    if isinstance(given, str):
        given = _json_object(given) if given.lstrip().startswith("{") else _pairs(given)
    found = {}
    for kind, value in given.items():
        number = value.get("count") if isinstance(value, Mapping) else value
        if kind not in KINDS:
            raise ConfigError(f"{LIMIT_FLAG}: {kind!r} is not a kind of input; write {', '.join(KINDS)}")
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise ConfigError(f"{LIMIT_FLAG}: the number for {kind} must be an integer from 0, not {number!r}")
        found[kind] = number
    return found


def _pairs(text: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind, equals, number = (piece.strip() for piece in part.partition("="))
        if not equals or not number.isdecimal():
            raise ConfigError(f"{LIMIT_FLAG} takes image=4, image=4,video=1 or JSON, not {text!r}")
        if kind in found:
            raise ConfigError(f"{LIMIT_FLAG} names {kind} twice")
        found[kind] = int(number)
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{LIMIT_FLAG} is not valid JSON: {error}") from error
    return found
