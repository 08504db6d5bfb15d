"""drift_statistics of all layers of a window step; plain torch does what the published code does.

That is: softmax of old and new scores in full, over a K cache as it was; a cosine over heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from elastic_cache import ops
from harness import Case, Data, num_bytes, run
from torch import Tensor

SIZES = ((32, 12, 2, 16, 350, 4, 32), (32, 12, 4, 16, 1024, 32, 128))


def make_case(
    data: Data,
    layers: int,
    tracked: int,
    committed: int,
    window: int,
    num_keys: int,
    heads: int,
    head_dim: int,
) -> Case:
    num_rows, scale = tracked + committed + window, 1 / math.sqrt(head_dim)
    q, k = (data.normal(layers, num_keys, heads, head_dim) for _ in range(2))
    q_old, k_old = (data.normal(layers, num_rows, heads, head_dim) for _ in range(2))
    rows, key_range = data.slots(num_rows, num_keys), data.int32([[0, num_keys]])
    segments, slots = data.int32([[0, tracked, committed, window, 0]]), rows.long()
    scores = scale * torch.einsum("lrhd,lkhd->lrhk", q[:, rows.long()], k).float()
    lse = scores.logsumexp(-1)
    mass = data.normal(layers, 1, num_keys, dtype=torch.float32)
    similarity = data.normal(layers, 1, dtype=torch.float64)

    def weights(query: Tensor, keys: Tensor) -> Tensor:
        scores = query.transpose(0, 1) @ keys.transpose(0, 1).mT
        return (scale * scores).float().softmax(-1)  # [H, rows, keys]

    def plain() -> None:
        for layer in range(layers):
            before = k[layer].clone()
            before[slots] = k_old[layer]
            p_new = weights(q[layer][slots], k[layer])
            p_old = weights(q_old[layer, :tracked], before)
            p_new[:, tracked + committed :].sum((0, 1))
            F.cosine_similarity(p_old, p_new[:, :tracked], dim=0).mean()

    return Case(
        f"{layers} layers, {tracked}+{window} rows, {num_keys} keys, {heads} x {head_dim}",
        native=lambda: ops.drift_statistics(
            q, k, q_old, k_old, lse, rows, segments, key_range, scale, mass, similarity
        ),
        plain=plain,
        num_bytes=num_bytes(k, mass, similarity),
        num_flops=2 * layers * (2 * tracked + window) * num_keys * heads * head_dim,
    )


if __name__ == "__main__":
    run("drift_statistics", lambda data: [make_case(data, *size) for size in SIZES])
