"""What tests of exchange start from."""

from pathlib import Path

import pytest
from support.made_elsewhere import NUM
from support.tiny import photos

from featstore import ImageSet


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    """Of `NUM` photographs, a quarter of them for validation."""
    return ImageSet.from_folder(photos(tmp_path / "photos", NUM)).split(valid=0.25)
