"""Choices: names that a program offers where the table they are keys of would load torch."""

from __future__ import annotations

HEADS = ("concat", "linear", "mlp")
"""The keys of `heads.HEADS`; a test holds them equal."""
