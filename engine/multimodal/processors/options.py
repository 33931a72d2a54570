"""The options of processors: `--mm-processor-kwargs`, and those of a request."""

from collections.abc import Mapping
from typing import Any

from engine.errors import RequestError

OPTIONS = "mm_processor_kwargs"  # the field of a request


def refuse_options(options: Mapping[str, Any], known: tuple[str, ...] = ()) -> None:
    """Raise RequestError if there are options besides those that a processor knows."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        have = f"it has {', '.join(known)}" if known else "it has none"
        raise RequestError(f"the model's processor has no option {unknown[0]!r}; {have}", OPTIONS)
