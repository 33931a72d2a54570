"""API keys: from the command line, a file and the environment; a key that can't work is refused at the start."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import ConfigError

VARIABLE = "REDLINE_API_KEY"


def read_keys(given: Sequence[str], file: str | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """All keys, of which a client must send one; none if no source is given.

    `given` come from --api-key; `file` has a key a line, with comments after `#`; the environment's variable may hold
    several, with commas between. ConfigError for a source without a key, since that server would answer everyone, and
    for a key that no HTTP header can carry.
    """
    keys = [check_key(key, "--api-key") for key in given]
    if file is not None:
        keys += read_key_file(Path(file).expanduser())
    if VARIABLE in environment:
        keys += [check_key(key.strip(), VARIABLE) for key in environment[VARIABLE].split(",")]
    return tuple(dict.fromkeys(keys))


def read_key_file(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"--api-key-file {file} can't be read: {reason}") from error
    keys = [key for line in text.splitlines() if (key := line.partition("#")[0].strip())]
    if not keys:
        raise ConfigError(f"--api-key-file {file} holds no key: write one a line")
    return [check_key(key, f"--api-key-file {file}") for key in keys]


def check_key(key: str, source: str) -> str:
    if not key:
        raise ConfigError(f"{source} is empty: the server would answer everyone; leave it out if that is meant")
    if re.search(r"[^!-~]", key):
        raise ConfigError(
            f"{source} holds a space or a character beyond ASCII, which no Authorization header can carry"
        )
    return key
