"""How fast a run is, by itself and beside the reference code. Measurements only: nothing here changes a run."""
