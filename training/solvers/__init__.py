"""Solvers: heads that are found exactly, or to a stated precision, instead of by epochs of steps."""
