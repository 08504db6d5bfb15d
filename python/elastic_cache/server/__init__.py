"""An OpenAI-compatible HTTP server over `service.py`; needs the extra `serve`."""

from elastic_cache.server.app import ServerOptions, create_app

__all__ = ["ServerOptions", "create_app"]
