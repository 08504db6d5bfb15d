"""Which rows are computed and when the cache is refreshed; one file a policy."""

from __future__ import annotations

from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan
from elastic_cache.policies.base import Policy
from elastic_cache.policies.block import BlockPolicy
from elastic_cache.policies.elastic import ElasticPolicy
from elastic_cache.policies.none import NonePolicy
from elastic_cache.policies.rolling import RollingPolicy

__all__ = ["Plan", "Policy", "make_policy"]


def make_policy(masked: list[bool], settings: GenerationConfig, eos_id: int) -> Policy:
    """The policy a request named, ready for its step 0; `masked` says what is to be decoded."""
    if settings.policy == "none":
        return NonePolicy(masked, settings)
    if settings.policy == "elastic":
        return ElasticPolicy(masked, settings)
    if settings.policy == "rolling":
        return RollingPolicy(masked, settings)
    return BlockPolicy(masked, settings, eos_id)
