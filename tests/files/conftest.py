"""What tests of the files' format start from."""

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a file may be written, and none is."""
    return tmp_path / "part-0.h5"
