"""`python -m training` is the `featstore-train` program."""

import sys

from training.cli import main

sys.exit(main())
