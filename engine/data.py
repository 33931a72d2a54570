"""Finds the data that ships with the product."""

import functools
import sys
from pathlib import Path

from engine.errors import ConfigError


def datasets_folder() -> Path:
    """The folder of presets and small data: next to the packages in a checkout, else under the installation's prefix.

    Raises ConfigError if it is at neither place.
    """
    checkout = Path(__file__).resolve().parent.parent / "datasets"
    installed = Path(sys.prefix) / "share" / "redline" / "datasets"
    for folder in (checkout, installed):
        # In an installation, the first one is the Hugging Face library of the same name.
        if (folder / "presets").is_dir() and not (folder / "__init__.py").exists():
            return folder
    raise ConfigError(f"the presets are missing: neither {checkout} nor {installed} holds them; reinstall redline")


@functools.cache
def known_models() -> dict[str, Path]:
    """The config files (dimensions, no weights) of models that ship with the product, by all of their names."""
    import yaml

    folder = datasets_folder() / "models"
    names = yaml.safe_load((folder / "names.yaml").read_text())
    return {name: folder / f"{stem}.json" for stem, of in names.items() for name in (stem, *of)}
