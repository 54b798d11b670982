"""Cli: the `featstore` program, and what both programs share."""
