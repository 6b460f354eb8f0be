"""Figures, Markdown and exports, made from a results folder alone. No torch."""
