"""What the packages name is what they say, whatever was imported before."""

from __future__ import annotations

import pytest
from support.processes import Processes


@pytest.mark.parametrize("package", ["training", "featstore"])
def test_no_public_name_is_a_module(new_processes: Processes, package: str) -> None:
    program = f"""
        import types, {package}
        from {package} import *
        names = {package}.__all__
        for name in names:
            getattr({package}, name)
        print(*[name for name in names if isinstance(getattr({package}, name), types.ModuleType)], "none")
    """
    assert new_processes.answer(program) == "none"
