"""What a file holds is known without torch."""

import json
import subprocess
import sys
from pathlib import Path

from support import released

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys, types
package = types.ModuleType("featstore")  # without what its own page imports
package.__path__ = [sys.argv[1]]
sys.modules["featstore"] = package
from pathlib import Path
import featstore.files.reading
from featstore.files.part import Part
from featstore.files.table import Table
part, table = Part.open(Path(sys.argv[2])), Table.open(Path(sys.argv[3]))
print(json.dumps([part.num_rows, part.storage_type.name, part.num_bytes, part.verify(), table.facts]))
assert "torch" not in sys.modules
"""


def test_parts_and_tables_are_opened_and_verified_without_torch() -> None:
    files = [str(path) for path in (released.part_of(2), released.table_of(2))]
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "featstore"), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_bytes = released.FEATURES.numel() * released.FEATURES.itemsize
    assert json.loads(done.stdout) == [released.NUM_ROWS, "bfloat16", num_bytes, [], released.TABLE_FACTS]
