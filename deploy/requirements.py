"""Prints the requirements of an image, from pyproject.toml in the working directory: `python requirements.py cpu`."""

import sys
import tomllib
from pathlib import Path

EXTRAS = {
    "cpu": ("audio", "mistral", "ray", "tracing", "video"),
    "cuda": ("audio", "gpu", "mistral", "ray", "tracing", "triton", "video"),
}


def requirements(device: str) -> list[str]:
    """The dependencies of the package and of the extras that the image of a device has."""
    if device not in EXTRAS:
        raise SystemExit(f"DEVICE={device}: images are for {' or '.join(EXTRAS)}")
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    return [*project["dependencies"], *(one for extra in EXTRAS[device] for one in optional[extra])]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
