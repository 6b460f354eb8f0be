"""The reading tower's numbers: from a results folder to estimates and comparisons. No torch."""
