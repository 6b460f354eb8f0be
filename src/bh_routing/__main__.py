"""`python -m bh_routing` is `bh-routing`."""

from __future__ import annotations

import sys

from bh_routing.cli import main

if __name__ == "__main__":
    sys.exit(main())
