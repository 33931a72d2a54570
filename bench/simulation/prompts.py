"""Prompts as token ids, and their images, for a server that has no tokenizer."""

import base64
import hashlib
import io
import math
from collections.abc import Sequence

import numpy as np

from bench.errors import BenchError
from bench.workloads.base import RequestSpec
from bench.workloads.chats import text_of
from engine.hardware.images import SimulatedImage

CHARACTERS_PER_TOKEN = 4  # of texts, as the workloads estimate it
_MULTIPLIERS = np.array([1, 31, 961, 29791], np.uint32)  # powers of 31, as in common hashes of strings


def prompt_ids(spec: RequestSpec) -> Sequence[int] | np.ndarray:
    """The prompt of a request; of texts as many ids as they are estimated to have.

    Texts that begin alike have ids that begin alike, so that the prefix cache finds what it would find.
    """
    if spec.prompt_ids is not None:
        return spec.prompt_ids
    if spec.prompt_text is not None:
        return text_ids(spec.prompt_text)
    return text_ids("".join(_message_text(message) for message in spec.messages or []))


def text_ids(text: str) -> np.ndarray:
    """One id for each CHARACTERS_PER_TOKEN characters: int32, at least one."""
    count = max(1, math.ceil(len(text) / CHARACTERS_PER_TOKEN))
    codes = np.zeros(count * CHARACTERS_PER_TOKEN, np.uint32)
    codes[: len(text)] = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    ids = (codes.reshape(count, CHARACTERS_PER_TOKEN) * _MULTIPLIERS).sum(axis=1, dtype=np.uint32)
    return (ids & 0x7FFFFFFF).astype(np.int32)


def images_of(spec: RequestSpec) -> list[SimulatedImage]:
    """The images of a request. Raises BenchError for other media."""
    found = []
    for message in spec.messages or []:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if part["type"] == "image_url":
                found.append(_image(part["image_url"]["url"]))
            elif part["type"] != "text":
                raise BenchError(
                    f"the workload has {part['type']}, which simulated hardware does not compute: use a workload of "
                    "texts, token ids or images (--workload)"
                )
    return found


def _image(url: str) -> SimulatedImage:
    from PIL import Image

    content = base64.b64decode(url.partition(",")[2])
    with Image.open(io.BytesIO(content)) as opened:  # reads the header only
        width, height = opened.size
    return SimulatedImage(width, height, hashlib.blake2b(content, digest_size=16).digest())


def _message_text(message: dict[str, object]) -> str:
    return f"{message.get('role')}\n{text_of(message.get('content')) or ''}\n"
