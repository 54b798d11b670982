"""`python -m training` is the `featstore-train` program."""

import sys

from training.cli.app import main

sys.exit(main())
