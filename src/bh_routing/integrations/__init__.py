"""Integrations with other programs; each needs its own optional extra."""
