"""``python -m phi4edge``: the command line."""

from __future__ import annotations

import sys

from phi4edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
