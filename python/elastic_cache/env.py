"""Environment variables: the only file that reads them."""

from __future__ import annotations

import os

API_KEY = "ELASTIC_CACHE_API_KEY"


def read_api_key() -> str | None:
    """The key that clients of the server must send; None where none, or an empty one, is set."""
    return os.environ.get(API_KEY) or None
