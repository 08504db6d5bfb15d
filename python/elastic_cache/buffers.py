"""Buffers of a pass: what rows become on their way through the layers, and what outlives one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from elastic_cache.models.weights import Model


@dataclass(frozen=True)
class Workspace:
    """Buffers for R rows; views of one allocation per request."""

    residual: torch.Tensor  # [R, d]
    hidden: torch.Tensor  # [R, d]
    delta: torch.Tensor  # [R, d]
    qkv: torch.Tensor  # [R, (H + 2 Hkv) * D]
    attention: torch.Tensor  # [R, H, D]
    attention_flat: torch.Tensor  # [R, H * D], a view of `attention`
    lse: torch.Tensor  # float32 [R, H]
    gate_up: torch.Tensor  # [R, 2F]
    activation: torch.Tensor  # [R, F]
    q_old: torch.Tensor  # [R, H, D]
    k_old: torch.Tensor  # [R, Hkv, D]

    @classmethod
    def allocate(cls, model: Model, num_rows: int, device: torch.device) -> Workspace:
        c = model.config
        shapes = dict(
            residual=(c.hidden_size,),
            hidden=(c.hidden_size,),
            delta=(c.hidden_size,),
            qkv=((c.num_heads + 2 * c.num_kv_heads) * c.head_dim,),
            attention=(c.num_heads, c.head_dim),
            lse=(c.num_heads,),
            gate_up=(2 * c.intermediate_size,),
            activation=(c.intermediate_size,),
            q_old=(c.num_heads, c.head_dim),
            k_old=(c.num_kv_heads, c.head_dim),
        )
        buffers = {
            name: torch.empty(
                (num_rows, *shape),
                device=device,
                dtype=torch.float32 if name == "lse" else model.dtype,
            )
            for name, shape in shapes.items()
        }
        return cls(**buffers, attention_flat=buffers["attention"].flatten(1))

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for name, t in vars(self).items() if name != "attention_flat")

    def rows(self, num_rows: int) -> Workspace:
        """The same buffers cut to their first `num_rows` rows."""
        return Workspace(**{name: buffer[:num_rows] for name, buffer in vars(self).items()})


@dataclass(frozen=True)
class OverwrittenRows:
    """What the drift test at the end of a pass of R rows needs of all layers.

    That is: what the rows overwrite in the caches, and the log-sum-exps of their attention.
    """

    q: torch.Tensor  # [L, R, H, D]
    k: torch.Tensor  # [L, R, Hkv, D]
    lse: torch.Tensor  # float32 [L, R, H]

    @classmethod
    def allocate(cls, model: Model, num_rows: int, device: torch.device) -> OverwrittenRows:
        c = model.config
        kind: dict[str, Any] = {"device": device, "dtype": model.dtype}
        return cls(
            q=torch.empty(c.num_layers, num_rows, c.num_heads, c.head_dim, **kind),
            k=torch.empty(c.num_layers, num_rows, c.num_kv_heads, c.head_dim, **kind),
            lse=torch.empty(c.num_layers, num_rows, c.num_heads, device=device),
        )

    @property
    def num_bytes(self) -> int:
        return self.q.nbytes + self.k.nbytes + self.lse.nbytes
