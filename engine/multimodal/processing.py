"""Decoding and processing of one multimodal input: what a process of the pool does, and the core's loop in V0."""

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from engine.children import Failure
from engine.errors import RedlineError, RequestError, cause_of
from engine.multimodal.feature_files import write_features
from engine.multimodal.pool_protocol import Done, Failed, Job, PoolOptions
from engine.multimodal.types import MediaKind, Processed, Processor

# By kind: module and function. Imported when the first input of the kind arrives.
DECODERS: dict[MediaKind, tuple[str, str]] = {
    "image": ("engine.media.images", "decode_image"),
    "audio": ("engine.media.audio", "decode_audio"),
    "video": ("engine.media.video", "decode_video"),
}
PAGE = os.sysconf("SC_PAGE_SIZE")


def decode_media(kind: MediaKind, data: bytes, limits: Any) -> Any:
    """A PIL image, an Audio or a Video. Raises RequestError if it can't be decoded within the limits."""
    module, function = DECODERS[kind]
    return getattr(importlib.import_module(module), function)(data, limits)


def media_limits(fields: Mapping[str, Any]) -> Any:
    """The MediaLimits of these fields."""
    return importlib.import_module("engine.media.limits").MediaLimits(**fields)


def process_media(
    processor: Processor, kind: MediaKind, data: bytes, count: int, options: Mapping[str, Any],
    limits: Any,
) -> Processed:  # fmt: skip
    """Decode and process one input.

    Raises RequestError for an input that can't be taken, RedlineError with the cause if something else fails.
    """
    try:
        return processor.process(kind, decode_media(kind, data, limits), count, options)
    except RedlineError:
        raise
    except Exception as error:  # libraries raise anything
        raise RedlineError(f"the {kind} could not be processed: {cause_of(error)}") from error


def make_processor(options: PoolOptions) -> Processor:
    module, _, name = options.factory.partition(":")
    processor: Processor = getattr(importlib.import_module(module), name)(options.model)
    return processor


def resident_bytes() -> int:
    """Memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * PAGE


def run_job(processor: Processor, limits: Any, job: Job, data: bytes) -> Done | Failed:
    """Process one input and write its file."""
    began = time.monotonic()
    try:
        made = process_media(processor, job.kind, data, job.count, job.options, limits)
        size = write_features(job.path, made.tensors)
    except Exception as error:  # ends this job only
        known = error if isinstance(error, RedlineError) else RedlineError(cause_of(error))
        field = known.field if isinstance(known, RequestError) else None
        return Failed(Failure.of(known), field, time.monotonic() - began, resident_bytes())
    seconds = time.monotonic() - began
    return Done(
        made.tokens, made.grid, made.seconds_per_frame, made.before, made.after, size, seconds, resident_bytes()
    )
