"""What the tests of the command share."""

import pytest

from tests.tiny import write_tiny


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny model without weights."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))
