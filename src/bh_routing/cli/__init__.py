"""The command line: each command parses, calls one function and prints."""

from bh_routing.cli.main import main

__all__ = ["main"]
