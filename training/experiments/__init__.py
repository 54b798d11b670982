"""Experiments: many fits side by side - sweeps, backbones, few shots, the runs in a folder - and their report."""
