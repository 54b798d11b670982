"""Cli: the `featstore-train` program."""
