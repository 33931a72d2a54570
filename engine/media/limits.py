"""The limits of media in requests: what a client may make the server fetch and decode."""

import msgspec


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
    max_decoded_frames: int = 30_000  # of a video; all frames up to the last one that is taken are decoded
    max_kept_pixels: int = 256 << 20  # of the frames that are kept of a video, together
