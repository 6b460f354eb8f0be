"""Experiments: the spec of a run, one experiment, the loop over all of them, and the store."""
