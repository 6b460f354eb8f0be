"""Statistics on numpy arrays: nothing here knows of models, files or torch."""
