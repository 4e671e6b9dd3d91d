"""Measurements of a run's speed, alone and beside the reference code. Nothing here changes a run."""
