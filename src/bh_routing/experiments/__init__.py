"""Experiments: what to run (spec), one experiment, the loop over all of them, and the store."""
