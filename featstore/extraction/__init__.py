"""Extraction: what is missing is planned, computed and filed."""
