"""Options of `redline serve` for the processing of multimodal inputs and its cache."""

from typing import Any

import click

from cli.options import Finite, JsonObject, option

PROCESSING = "Processing of multimodal inputs"

MM_OPTIONS = (
    option(
        PROCESSING, "--mm-processors", type=click.IntRange(1), metavar="N", default_text="a quarter of the cores",
        help="Most processes that decode and process images, audio and video, of all API processes together. They "
        "start when inputs wait for them.",
    ),
    option(
        PROCESSING, "--mm-cache-gb", "--mm-processor-cache-gb", "mm_cache_gb", type=Finite(0), metavar="GIB",
        default_text="4, at most half of the free shared memory",
        help="Size of the caches of processed inputs in shared memory, of all API processes together. 0 keeps nothing "
        "between requests.",
    ),
    option(
        PROCESSING, "--disable-mm-preprocessor-cache", is_flag=True, default=False,
        help="The same as --mm-cache-gb 0.",
    ),
    option(
        PROCESSING, "--mm-processor-kwargs", type=JsonObject(), metavar="JSON",
        help="Options of the model's processor for all inputs, such as '{\"max_pixels\": 1003520}'.",
    ),
)  # fmt: skip


def apply_cache(settings: dict[str, Any]) -> None:
    """Turn --disable-mm-preprocessor-cache in `settings` into a size."""
    if settings.pop("disable_mm_preprocessor_cache"):
        if settings["mm_cache_gb"]:
            raise click.UsageError("--disable-mm-preprocessor-cache and --mm-cache-gb exclude each other")
        settings["mm_cache_gb"] = 0.0
