"""What holds for the CUDA device without a GPU."""

import re
from pathlib import Path

ENGINE = Path(__file__).parents[3] / "engine"


def test_one_file_names_torch_cuda() -> None:
    """Everything else goes through `engine.worker.device.Device`, so that it runs on other devices and in tests."""
    named = re.compile(r"torch\.cuda|from torch import cuda")
    found = [str(path.relative_to(ENGINE)) for path in ENGINE.rglob("*.py") if named.search(path.read_text())]
    assert found == ["worker/cuda_device.py"]
