"""API keys from the command line, a file and the environment. A key that no client could send is an error."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.errors import ConfigError

VARIABLE = "REDLINE_API_KEY"


def read_keys(given: Sequence[str], file: str | None, environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """All keys, of which a client must send one; none if no source is given.

    Args:
        given: keys of --api-key.
        file: has one key per line, and comments after `#`.
        environment: its variable REDLINE_API_KEY holds keys separated by commas.

    Raises:
        ConfigError: a source has no key, so that the server would accept every client, or a key does not fit into an
            HTTP header.
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
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--api-key-file {file} can't be read: {reason}") from error
    keys = [key for line in text.splitlines() if (key := line.partition("#")[0].strip())]
    if not keys:
        raise ConfigError(f"--api-key-file {file} has no keys: write one per line")
    return [check_key(key, f"--api-key-file {file}") for key in keys]


def check_key(key: str, source: str) -> str:
    if not key:
        raise ConfigError(f"{source} is empty: the server would accept every client; leave it out if that is intended")
    if re.search(r"[^!-~]", key):
        raise ConfigError(f"{source} has a space or a non-ASCII character, which an Authorization header can't have")
    return key
