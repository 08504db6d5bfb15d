"""Failures that are not a wrong argument (those are ValueError)."""


class ElasticCacheError(RuntimeError):
    """Base of the errors below."""


class NonFiniteLogitsError(ElasticCacheError):
    """The model produced logits that are not finite numbers; the request was stopped."""
