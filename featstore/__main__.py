"""The `featstore` program as ``python -m featstore``."""

import sys

from featstore.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
