"""Rendering, masks, batches, trainers, checkpoints, merge."""
