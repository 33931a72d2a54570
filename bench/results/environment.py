"""What a run depends on besides its options: versions, hardware and time."""

import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from engine.host import cores, processor, total_memory


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what influences a measurement; in a checkout also the commit."""
    found = {"python": platform.python_version(), **_commit()}
    for name in ("redline-llm", "torch", "transformers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _commit() -> dict[str, str]:
    """The commit of this code, with a "+" if files were changed; nothing outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {}
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty=+", "--match="]
    result = subprocess.run(command, capture_output=True, text=True)
    return {"commit": result.stdout.strip()} if result.returncode == 0 else {}


def hardware() -> dict[str, Any]:
    """The machine: processor, and the cores and memory (GiB) that this process may use."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "memory_gib": round(total_memory() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
    }
