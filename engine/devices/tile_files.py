"""Files with measured tiles of the attention kernels, which `redline profile --tune` writes and `serve` reads."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError
from engine.kernels.tile_table import TileTable, parse_table

FLAG = "--tile-table"


def default_file(gpu: str) -> Path:
    """The file in the user's cache for GPUs of this name."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", gpu).strip("-.") or "gpu"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "redline" / "tiles" / f"{name}.yaml"


def read_table(path: Path, target: str | None = None) -> TileTable:
    """The table in a file. Raises ConfigError naming the file and the field that is wrong.

    Args:
        target: of the GPU, which must be that of the table; None: not known.
    """
    try:
        table = parse_table(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror} ({FLAG})") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())} ({FLAG})") from None
    if target is not None and table.target != target:
        raise ConfigError(f"{path}: target is {table.target}, and this GPU is {target} ({FLAG})")
    return table


def write_table(path: Path, table: TileTable, **notes: Any) -> None:
    """Write a table, complete or not at all. Raises ConfigError if the file can't be written.

    Args:
        notes: fields that are only for readers: gpu, shape, made.
    """
    plain = table.plain()
    head = yaml.safe_dump(notes | {"target": plain["target"]}, sort_keys=False, allow_unicode=True)
    rows = (yaml.safe_dump(row, default_flow_style=True, sort_keys=False, width=1000) for row in plain["tiles"])
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(head + "tiles:\n" + "".join(f"- {row}" for row in rows), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror} ({FLAG})") from None


def find_table(given: str | None, gpu: str, target: str | None) -> tuple[str, list[str]]:
    """The file for a GPU, empty for none, and warnings.

    Args:
        given: by the user, whose file must be right; None: the default file, which is left out with a warning if not.
    """
    path = Path(given) if given is not None else default_file(gpu)
    if given is None and not path.exists():
        return "", []
    try:
        read_table(path, target)
    except ConfigError as error:
        if given is not None:
            raise
        return "", [f"measured tiles are not used: {error}"]
    return str(path.absolute()), []
