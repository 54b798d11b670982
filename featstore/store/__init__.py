"""Store: feature sets and image tables on disk; find, read, keep."""
