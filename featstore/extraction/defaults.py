"""Defaults: what is meant where nobody says; free of torch, for a program's help has them."""

from __future__ import annotations

DEFAULT_VALID, DEFAULT_SPLIT_SEED = 0.2, 0
"""What the programs hold out of a set without a split of its own."""

NUM_ROWS = 64
"""Rows that an adoption computes again and compares."""
