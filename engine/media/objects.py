"""Inputs that Python code hands over as objects: encoded without loss, so that all inputs take the same way."""

import io
from typing import Any

import numpy as np

from engine.errors import RequestError


def encode_object(kind: str, value: Any) -> bytes:
    """The bytes of a file with an input.

    Args:
        kind: image, audio or video.
        value: the bytes of a file; of an image also a PIL image or uint8[rows, columns, 3]; of a sound also
            (samples, samples per second), with float samples of one channel.

    Raises:
        RequestError: the value is none of these.
    """
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if kind == "image":
        return _encode_image(value)
    if kind == "audio" and isinstance(value, tuple) and len(value) == 2:
        return _encode_audio(*value)
    known = {"audio": "(samples, samples per second)"}.get(kind)
    forms = f"{known}, or the bytes of a file" if known else "the bytes of a file"
    raise RequestError(f"the {kind} must be given as {forms}, not as {type(value).__name__}", "multi_modal_data")


def _encode_image(value: Any) -> bytes:
    from PIL import Image

    from engine.media.images import as_rgb

    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
            raise RequestError(
                f"the image must be uint8[rows, columns, 3], not {value.dtype}{list(value.shape)}", "multi_modal_data"
            )
        value = Image.fromarray(value)
    if not isinstance(value, Image.Image):
        raise RequestError(
            f"the image must be a PIL image, an array or the bytes of a file, not {type(value).__name__}",
            "multi_modal_data",
        )
    file = io.BytesIO()
    as_rgb(value).save(file, "PNG", compress_level=1, exif=b"")  # a PIL image is taken as it is, without its EXIF
    return file.getvalue()


def _encode_audio(samples: Any, rate: Any) -> bytes:
    values = np.asarray(samples)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.floating) or not isinstance(rate, int | float):
        raise RequestError(
            f"the audio must be (float samples of one channel, samples per second), not {values.dtype}"
            f"{list(values.shape)}",
            "multi_modal_data",
        )
    data = values.astype("<f4").tobytes()
    number = int.to_bytes
    form = b"".join(
        number(value, size, "little")
        for value, size in ((3, 2), (1, 2), (int(rate), 4), (int(rate) * 4, 4), (4, 2), (32, 2))
    )
    body = b"WAVEfmt " + number(16, 4, "little") + form + b"data" + number(len(data), 4, "little") + data
    return b"RIFF" + number(len(body), 4, "little") + body
