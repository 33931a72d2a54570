"""Decoding of images with PIL: from bytes that a client sent to an RGB picture, within limits."""

import io
import re
import warnings
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from engine.media.limits import MediaLimits

if TYPE_CHECKING:
    from PIL.Image import Image

# The formats of OpenAI's API, and BMP. Formats of vectors and documents, and rare ones, are left to nobody's parser.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
SHOWN_FORMATS = "PNG, JPEG, WebP, GIF and BMP"
GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # PIL's modes for 16-bit grey; `I` holds 16 bits of a PNG too
SEVERAL_PICTURES = "MPO"  # a JPEG with further pictures (previews, depth) behind the first, as cameras write it


def decode_image(data: bytes, limits: MediaLimits) -> "Image":
    """Decode an image to RGB, upright as its EXIF data says.

    The limits are checked against the header, before any pixel is decoded. The values are those of PIL's
    `convert("RGB")`: an alpha channel is dropped, not composed on a background. The exception is 16-bit grey, which PIL
    would clip to white: its high bytes are taken, as PIL itself does for 16-bit color.

    Args:
        data: the file.
        limits: pixels and side.

    Raises:
        RequestError: the format isn't accepted, a limit is exceeded, the file has several frames, or it is damaged.
    """
    import PIL
    from PIL import Image, ImageOps

    if not data:
        raise RequestError("the image is empty (0 bytes)")
    Image.MAX_IMAGE_PIXELS = limits.max_image_pixels  # PIL's own check refuses twice as many, frames included
    with warnings.catch_warnings():
        # The warnings are about more than half of PIL's limit, and about palettes with transparency.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                _check_header(opened, limits)
                opened.load()
                return as_rgb(ImageOps.exif_transpose(opened))
        except RequestError:
            raise
        except PIL.UnidentifiedImageError as error:
            raise RequestError(f"the image can't be read: it is none of {SHOWN_FORMATS}{_looks_like(data)}") from error
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            raise _too_large(f"{int(pixels[0]):,}" if pixels else "more", limits) from error
        except MemoryError as error:
            raise RequestError("the image can't be decoded: out of memory") from error
        except Exception as error:  # decoders of damaged files raise errors of any kind
            raise RequestError(f"the image can't be decoded: {_reason(error)}") from error


def _check_header(opened: Any, limits: MediaLimits) -> None:
    width, height = opened.size
    longest = max(width, height)
    if longest > limits.max_image_side:
        raise RequestError(
            f"the image has {width:,} x {height:,} pixels: a side may have at most {limits.max_image_side:,}"
        )
    if width * height > limits.max_image_pixels:
        raise _too_large(f"{width:,} x {height:,}", limits)
    if opened.format != SEVERAL_PICTURES and getattr(opened, "is_animated", False):
        kind = {"GIF": "GIF", "PNG": "PNG", "WEBP": "WebP"}.get(opened.format, "image")
        raise RequestError(
            f"the {kind} is animated ({opened.n_frames:,} frames): send a single frame, or each frame as an image"
        )


def _too_large(size: str, limits: MediaLimits) -> RequestError:
    return RequestError(
        f"the image has {size} pixels, but at most {limits.max_image_pixels:,} are allowed (--max-image-pixels)"
    )


def as_rgb(image: Any) -> "Image":
    """A copy in RGB, with the values that `decode_image` states."""
    rgb: Image = (_high_bytes(image) if image.mode in GREY_16 else image).convert("RGB")
    return rgb


def _high_bytes(image: Any) -> Any:
    import numpy as np
    from PIL import Image

    values = np.asarray(image).astype(np.int64)
    return Image.fromarray((values.clip(0, 0xFFFF) >> 8).astype(np.uint8), "L")


def _looks_like(data: bytes) -> str:
    """A guess what the file is instead, for the message."""
    start = data[:512].lstrip().lower()
    if b"<svg" in start or (start.startswith(b"<?xml") and b"svg" in data[:4096].lower()):
        return " (it looks like SVG: send it rendered)"
    if start.startswith((b"<!doctype", b"<html")):
        return " (it looks like a web page)"
    if start.startswith(b"%pdf"):
        return " (it looks like a PDF: send its pages as images)"
    if start.startswith((b"ii*\0", b"mm\0*")):
        return " (it looks like TIFF)"
    if data[4:8] == b"ftyp":
        return " (it looks like HEIC, AVIF or a video)"
    return ""


def _reason(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return text or type(error).__name__
