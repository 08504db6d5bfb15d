"""`python -m elastic_cache`: the same as the command `elastic-cache`."""

from __future__ import annotations

import sys

from elastic_cache.cli import main

if __name__ == "__main__":
    sys.exit(main())
