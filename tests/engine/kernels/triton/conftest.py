"""Kernels are interpreted here, on the CPU: tests/conftest.py sets TRITON_INTERPRET.

`make test-triton` runs these files with REDLINE_TEST_TRITON=1: with all of hypothesis' examples and the cases marked
`exhaustive`. The common suite runs a cheap part.
"""

import importlib.util
import os

from hypothesis import settings

ALL = os.environ.get("REDLINE_TEST_TRITON") == "1"

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.engine.kernels.triton import quick

    quick.patch()

settings.register_profile("triton", deadline=None, max_examples=60 if ALL else 4, derandomize=not ALL)
