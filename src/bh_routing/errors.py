"""Exceptions that bh-routing raises on purpose.

BHRoutingError
├── InputError            bad value, file or option; the command line exits with 2
│   ├── CalibrationError  a calibration that is missing, unsuitable or of another model
│   ├── ModelError        a model that can't be found, loaded or routed
│   └── ResultsError      a results folder that must not be changed as requested
└── ExperimentError       one experiment failed; the run continues and exits with 1
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BHRoutingError(Exception):
    """Base class of all errors of bh-routing."""


class InputError(BHRoutingError, ValueError):
    """A user's value is invalid; the message names the value, the allowed range and the remedy."""


class CalibrationError(InputError):
    """A calibration is missing, was made for another model, or can't resolve the given alpha."""


class ModelError(InputError):
    """A model can't be found, loaded or routed."""


class ResultsError(InputError):
    """A results folder holds files that this run must not change."""


class ExperimentError(BHRoutingError):
    """One experiment could not be finished."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Build the error for an unknown name; it lists the known names and suggests the nearest.

    Example:
        >>> str(unknown_name("null", "gausian", ["gaussian", "pooled"]))
        "unknown null 'gausian'; known: gaussian, pooled; did you mean 'gaussian'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {name!r}; known: {', '.join(known)}{hint}")
