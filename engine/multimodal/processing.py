"""Decoding and processing of one multimodal input: what a process of the pool does, and the core's loop in V0."""

import importlib
import os
import time
from typing import Any

from engine.children import Failure
from engine.errors import RedlineError, RequestError, cause_of
from engine.media.audio import decode_audio
from engine.media.images import decode_image
from engine.media.limits import MediaLimits
from engine.media.video import decode_video
from engine.multimodal.feature_files import write_features
from engine.multimodal.pool_protocol import Done, Failed, Job, PoolOptions
from engine.multimodal.types import MediaKind, Processed, Processor

PAGE = os.sysconf("SC_PAGE_SIZE")


def decode_media(kind: MediaKind, data: bytes, limits: MediaLimits) -> Any:
    """A PIL image, an Audio or a Video. Raises RequestError if it can't be decoded within the limits."""
    # Each decoder's library is imported when the first input of its kind arrives.
    if kind == "image":
        return decode_image(data, limits)
    return decode_audio(data, limits) if kind == "audio" else decode_video(data, limits)


def process_media(processor: Processor, job: Job, data: bytes, limits: MediaLimits) -> Processed:
    """Decode and process one input.

    Raises RequestError for an input that can't be taken, RedlineError with the cause if something else fails.
    """
    try:
        return processor.process(job.kind, decode_media(job.kind, data, limits), job.count, job.options)
    except RedlineError:
        raise
    except Exception as error:  # libraries raise anything
        raise RedlineError(f"the {job.kind} could not be processed: {cause_of(error)}") from error


def make_processor(options: PoolOptions) -> Processor:
    module, _, name = options.factory.partition(":")
    processor: Processor = getattr(importlib.import_module(module), name)(options.model)
    return processor


def resident_bytes() -> int:
    """Memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * PAGE


def run_job(processor: Processor, limits: MediaLimits, job: Job, data: bytes) -> Done | Failed:
    """Process one input and write its file."""
    began = time.monotonic()
    try:
        made = process_media(processor, job, data, limits)
        size = write_features(job.path, made.tensors)
    except Exception as error:  # ends this job only
        known = error if isinstance(error, RedlineError) else RedlineError(cause_of(error))
        field = known.field if isinstance(known, RequestError) else None
        return Failed(Failure.of(known), field, time.monotonic() - began, resident_bytes())
    seconds = time.monotonic() - began
    return Done(
        made.tokens, made.grid, made.seconds_per_frame, made.before, made.after, size, seconds, resident_bytes()
    )
