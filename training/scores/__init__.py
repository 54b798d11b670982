"""Scores: what outputs and targets say of a model, of two models, of single images."""
