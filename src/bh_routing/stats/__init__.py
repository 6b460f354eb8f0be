"""Statistics on numpy arrays, independent of models, files and torch."""
