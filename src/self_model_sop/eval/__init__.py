"""Measurements of models on held-out text, offline."""
