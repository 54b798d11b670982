"""The `featstore` program as ``python -m featstore``."""

import sys

from featstore.cli import main

sys.exit(main())
