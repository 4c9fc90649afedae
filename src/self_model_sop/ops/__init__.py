"""Verbs around the stages: run, init, config, runs, doctor."""
