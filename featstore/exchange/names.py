"""Names: the endings of files that an export makes, for programs that list them where the table would load numpy."""

from __future__ import annotations

EXPORT_SUFFIXES = (".h5", ".hdf5", ".npy", ".safetensors", ".parquet")
"""`export.SUFFIXES`; a test holds them equal."""
