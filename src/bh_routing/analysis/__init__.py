"""Estimates and comparisons, computed from a results folder without torch."""
