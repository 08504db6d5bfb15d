"""What a checkpoint becomes: the tensors of one model, fused where the step wants them fused.

Every matrix has the logical shape [out, in]. Its storage is [in, out] (the tensor is a transposed
view): `ops.linear` reads that on the CPU, and the vendor's products of a step are 1 to 3 % faster
with it on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from elastic_cache.config import ModelConfig

if TYPE_CHECKING:
    from elastic_cache.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class LayerWeights:
    """One block; d hidden_size, H heads, Hkv KV heads, D head_dim, F intermediate_size."""

    attention_norm: torch.Tensor  # [d]
    qkv: torch.Tensor  # [(H + 2 Hkv) * D, d]: all q heads, all k heads, all v heads
    qkv_bias: torch.Tensor | None  # [(H + 2 Hkv) * D]
    attention_out: torch.Tensor  # [d, H * D]
    mlp_norm: torch.Tensor  # [d]
    gate_up: torch.Tensor  # [2F, d]: gate, then up
    down: torch.Tensor  # [d, F]


@dataclass(frozen=True)
class ModelWeights:
    """All tensors of a model, in its dtype and on its device; `rope` is always float32."""

    embedding: torch.Tensor  # [vocab_size, d], row-major
    layers: tuple[LayerWeights, ...]
    final_norm: torch.Tensor  # [d]
    head: torch.Tensor  # [vocab_size, d]
    rope: torch.Tensor  # [max_length, D]: D/2 cosines, then D/2 sines

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors; a tied head counts once."""
        own = [self.embedding, self.final_norm, self.rope]
        own += [] if self.head is self.embedding else [self.head]
        layers = [tensor for layer in self.layers for tensor in vars(layer).values()]
        return sum(tensor.nbytes for tensor in (*own, *layers) if tensor is not None)


@dataclass(frozen=True)
class Model:
    """A loaded checkpoint."""

    name: str
    config: ModelConfig
    weights: ModelWeights
    tokenizer: Tokenizer | None
    device: torch.device
    dtype: torch.dtype


def rope_table(length: int, head_dim: int, theta: float) -> torch.Tensor:
    """Rotation table [length, head_dim] float32: head_dim / 2 cosines, then as many sines.

    The same operations in the same order and precision as LLaDA's own code, so the same bits;
    computed on the CPU for every device, because devices differ in the last bit of cos and sin.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    inv_freq = 1.0 / (theta**exponents)
    angles = torch.outer(torch.arange(length, dtype=torch.float), inv_freq)
    return torch.cat((angles.cos(), angles.sin()), dim=1)
