"""drift_attention of a window step; plain torch does what the published code does.

That is: attention; softmax of old and new scores in full, over a K cache as it was; a cosine over
heads.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from elastic_cache import ops
from harness import Case, Data, num_bytes, run
from torch import Tensor

SIZES = ((4, 2, 16, 350, 4, 32), (8, 4, 32, 1024, 32, 128))


def make_case(
    data: Data, tracked: int, committed: int, window: int, num_keys: int, heads: int, head_dim: int
) -> Case:
    num_rows, scale = tracked + committed + window, 1 / math.sqrt(head_dim)
    q, k, v, k_before = (data.normal(num_keys, heads, head_dim) for _ in range(4))
    rows, key_range = data.slots(num_rows, num_keys), data.int32([[0, num_keys]])
    segments = data.int32([[0, tracked, committed, window, 0]])
    slots = rows.long()
    q_old, k_old = data.normal(num_rows, heads, head_dim), k_before[slots].contiguous()
    out, lse = torch.empty_like(q_old), data.normal(num_rows, heads, dtype=torch.float32)
    mass = data.normal(1, num_keys, dtype=torch.float32)
    similarity = data.normal(1, dtype=torch.float64)

    def weights(query: Tensor, keys: Tensor) -> Tensor:
        scores = query.transpose(0, 1) @ keys.transpose(0, 1).mT
        return (scale * scores).float().softmax(-1)  # [H, rows, keys]

    def plain() -> None:
        p_new, p_old = weights(q[slots], k), weights(q_old[:tracked], k_before)
        p_new[:, tracked + committed :].sum((0, 1))
        p_new.to(v.dtype) @ v.transpose(0, 1)
        F.cosine_similarity(p_old, p_new[:, :tracked], dim=0).mean()

    return Case(
        f"{tracked}+{window} rows, {num_keys} keys, {heads} x {head_dim}",
        native=lambda: ops.drift_attention(
            q,
            k,
            v,
            q_old,
            k_old,
            rows,
            segments,
            key_range,
            scale,
            out,
            lse,
            mass,
            similarity,
        ),  # fmt: skip
        plain=plain,
        num_bytes=num_bytes(k, v, q_old, q_old, k_old, out, lse, mass),
        num_flops=2 * (2 * num_rows + tracked) * num_keys * heads * head_dim,
    )


if __name__ == "__main__":
    run("drift_attention", lambda data: [make_case(data, *size) for size in SIZES])
