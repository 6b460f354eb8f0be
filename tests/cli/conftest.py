"""The command line's tests run on the demo model, loaded once."""

from tests.experiments.conftest import loaded_demo

__all__ = ["loaded_demo"]
