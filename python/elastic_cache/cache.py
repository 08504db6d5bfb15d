"""Storage per layer for every slot: keys, values, queries (after RoPE) and layer inputs.

A slot is sequence * capacity + position. The cache knows no policy: it is allocated once per
request with what the policy needs kept, and only ops write into it (`ops.cache_write`,
`ops.add_rms_norm`). A kind that need not outlive its layer is one shared layer of scratch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elastic_cache.config import ModelConfig


@dataclass(frozen=True)
class CacheNeeds:
    """Which kinds must survive from one step to the next."""

    keys_values: bool
    queries: bool
    inputs: bool


@dataclass(frozen=True)
class LayerCache:
    """Views of one layer; N = sequences * capacity slots."""

    q: torch.Tensor  # [N, H, D]
    k: torch.Tensor  # [N, Hkv, D]
    v: torch.Tensor  # [N, Hkv, D]
    x: torch.Tensor | None  # [N, d] residual stream before the layer's first norm


class Cache:
    """All layers of the cache of one request; `q` and `k` are [L, N, heads, D], L = 1 of scratch.

    Args:
        config: the model's shape.
        num_sequences, capacity: S sequences of C slots each.
        needs: what must be kept per layer; the rest shares one layer of storage.
        device, dtype: where and in which type it is stored.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_sequences: int,
        capacity: int,
        needs: CacheNeeds,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.num_sequences = num_sequences
        self.capacity = capacity
        slots, depth = num_sequences * capacity, config.num_layers

        def allocate(layers: int, *shape: int) -> torch.Tensor:
            return torch.zeros((layers, slots, *shape), device=device, dtype=dtype)

        query = (config.num_heads, config.head_dim)
        key = (config.num_kv_heads, config.head_dim)
        self.q = q = allocate(depth if needs.queries else 1, *query)
        self.k = k = allocate(depth if needs.keys_values else 1, *key)
        v = allocate(depth if needs.keys_values else 1, *key)
        x = allocate(depth, config.hidden_size) if needs.inputs else None
        self.layers = tuple(
            LayerCache(
                q[layer % len(q)],
                k[layer % len(k)],
                v[layer % len(v)],
                None if x is None else x[layer],
            )
            for layer in range(depth)
        )
        self.num_bytes = sum(t.numel() * t.element_size() for t in (q, k, v, x) if t is not None)
