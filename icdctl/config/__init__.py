"""Settings of a run: what there is, where values come from, and the one frozen configuration that results."""
