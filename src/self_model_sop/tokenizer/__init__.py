"""Vocabulary expansion: append-only, measured, checked on the reloaded files."""
