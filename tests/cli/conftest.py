"""What tests of the commands start from."""

from functools import partial
from pathlib import Path

import pytest
from support import two_sets
from support.programs import Program, Run


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photographs, models and a store of two sets, for tests to copy."""
    return two_sets.make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def featstore(run: Run) -> Program:
    """Runs ``featstore ARG ...``."""
    return partial(run, "featstore")
