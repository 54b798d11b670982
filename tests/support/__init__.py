"""Support: what several tests arrange, run and compare with."""
