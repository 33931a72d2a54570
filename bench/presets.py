"""Finds the data that ships with the product."""

import sys
from pathlib import Path

from bench.errors import BenchError


def datasets_folder() -> Path:
    """The folder of presets and small data: beside the packages in a checkout, else under the installation's prefix."""
    beside = Path(__file__).resolve().parent.parent / "datasets"
    installed = Path(sys.prefix) / "share" / "redline" / "datasets"
    for folder in (beside, installed):
        # In an installation, "beside" is where the Hugging Face library of the same name lives.
        if (folder / "presets").is_dir() and not (folder / "__init__.py").exists():
            return folder
    raise BenchError(f"the presets are missing: neither {beside} nor {installed} holds them; install redline again")
