"""Serving under a rule: a plugin for vLLM, and the command that starts a server with it."""
