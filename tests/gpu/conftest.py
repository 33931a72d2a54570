"""Cases marked `exhaustive` run by `make test-triton` only."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "exhaustive" in item.keywords and os.environ.get("REDLINE_TEST_TRITON") != "1":
            item.add_marker(pytest.mark.skip(reason="make test-triton runs it"))
