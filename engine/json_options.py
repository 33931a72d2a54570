"""Options whose values are JSON objects."""

import json
from typing import Any

from engine.errors import ConfigError


def read_overrides(text: str, option: str = "--hf-overrides") -> dict[str, Any]:
    """Parse fields of config.json from JSON text."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{option} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{option} must be a JSON object, not {text}")
    return found
