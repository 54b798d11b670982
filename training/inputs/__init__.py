"""Inputs: where a fit reads from, why, and the batches it gets."""
