"""Which rows are computed and when the cache is refreshed; one file a policy."""

from __future__ import annotations

from elastic_cache.config import GenerationConfig
from elastic_cache.plan import DriftTest, Plan
from elastic_cache.policies.base import Policy
from elastic_cache.policies.block import BlockPolicy
from elastic_cache.policies.elastic import ElasticPolicy
from elastic_cache.policies.none import NonePolicy
from elastic_cache.state import DecodeState

__all__ = ["DriftTest", "Plan", "Policy", "make_policy"]


def make_policy(state: DecodeState, settings: GenerationConfig, eos_id: int) -> Policy:
    """The policy a request named, ready for its step 0."""
    if settings.policy == "none":
        return NonePolicy(state, settings)
    if settings.policy == "elastic":
        return ElasticPolicy(state, settings)
    return BlockPolicy(state, settings, eos_id)
