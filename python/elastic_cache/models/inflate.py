"""A model as large as another one that computes what a small one computes.

So a policy can be timed at the cost of LLaDA-8B and judged by the answers of a small trained model.
Nothing is padded with zeros that would make a product cheaper; the function is the same because

    residual   x' = s R x: R [d', d] has orthonormal columns, drawn at random, and s = sqrt(d' / d)
               keeps the mean square that RMSNorm divides by; norm weights go into the matrices
    heads      every head is there d_H' / d_H times, its output divided among the copies, so the
               attention weights, and with them drift and tracked tokens, are those of the small
               model; element pairs of RoPE go where the large head has the same frequency
    channels   copies as well, with random factors in `up` that `down` takes back
    new tokens one channel of the residual stream holds a constant that no layer reads or changes
               (the epsilon of RMSNorm is less by its mean square); the head reads it, and gives
               every added token a logit far below all others

The elements of queries and keys without a frequency of the small model read what is orthogonal to
R, which the residual stream never has: rows of ordinary size, and zero as a result.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_cache.config import ModelConfig
from elastic_cache.memory import check_memory
from elastic_cache.models.weights import LayerWeights, Model, ModelWeights, rope_table

LLADA_8B = ModelConfig(
    architecture="llada",
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=126464,
    max_length=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    mask_id=126336,
    eos_id=126081,
)
SHAPES = {"llada-8b": LLADA_8B}

_CONSTANT = 0.125  # in the last channel; a power of two, which every dtype adds and keeps exactly
_FAR_BELOW = 2.0**20  # times the normalised constant: the logit of an added token, negative


def inflate(
    model: Model, shape: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Model:
    """`model` at the size of `shape`, on `device`; tokens, tokenizer and length stay its own.

    Args:
        model: the small model; best in float32, as its rounding is part of the result.
        shape: sizes to reach: d', F', H', Hkv', D' and V' are taken from it.
        device, dtype: of the result, which is computed there, layer by layer, in float32.
        seed: of the rotation and of everything drawn at random.

    Raises:
        ValueError: the sizes do not allow it (the sentence says which rule they break), or the
            GPU has too little free memory.
    """
    _check(model.config, shape)
    config = dataclasses.replace(
        model.config,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        tie_embeddings=False,
        rms_norm_eps=model.config.rms_norm_eps - _CONSTANT**2 / shape.hidden_size,
    )
    # The head is made in float32, beside a copy of itself.
    num_bytes = config.num_parameters * dtype.itemsize + 8 * config.vocab_size * config.hidden_size
    check_memory(device, num_bytes, "the inflated weights and what it takes to make them")
    widening = _Widening(model.config, config, device, dtype, seed)
    small = model.weights
    weights = ModelWeights(
        embedding=widening.embedding(small.embedding),
        layers=tuple(widening.layer(layer) for layer in small.layers),
        final_norm=widening.final_norm(),
        head=widening.head(small.head, small.final_norm),
        rope=rope_table(config.max_length, config.head_dim, config.rope_theta).to(device),
    )
    return Model(f"{model.name} inflated", config, weights, model.tokenizer, device, dtype)


def _check(small: ModelConfig, large: ModelConfig) -> None:
    def refuse(rule: str, *values: object) -> None:
        raise ValueError(
            f"a model cannot be inflated so: {rule}, got {' and '.join(map(str, values))}"
        )

    if small.num_layers != large.num_layers:
        refuse("both must have as many layers", small.num_layers, large.num_layers)
    if large.hidden_size <= small.hidden_size:
        refuse("hidden_size must grow", small.hidden_size, large.hidden_size)
    if _CONSTANT**2 / large.hidden_size >= small.rms_norm_eps:
        least = int(_CONSTANT**2 / small.rms_norm_eps) + 1
        refuse(f"hidden_size must be at least {least}", large.hidden_size)
    for name in ("num_heads", "num_kv_heads", "head_dim"):
        a, b = getattr(small, name), getattr(large, name)
        if b % a:
            refuse(f"{name} must become a multiple of itself", a, b)
    if small.num_heads * large.num_kv_heads != large.num_heads * small.num_kv_heads:
        refuse(
            "as many queries must share a key",
            f"{small.num_heads} / {small.num_kv_heads}",
            f"{large.num_heads} / {large.num_kv_heads}",
        )
    for name in ("intermediate_size", "vocab_size"):
        a, b = getattr(small, name), getattr(large, name)
        if b < a:
            refuse(f"{name} must not shrink", a, b)
    if small.rope_theta != large.rope_theta:
        refuse("rope_theta must be the same", small.rope_theta, large.rope_theta)


class _Widening:
    """What all layers share: the rotation, and how a tensor of the small model becomes large."""

    def __init__(
        self,
        small: ModelConfig,
        large: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.small, self.large = small, large
        self._device, self._dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(seed)
        d, width = small.hidden_size, large.hidden_size
        # The last channel holds the constant: the rotation leaves it out.
        basis, _ = torch.linalg.qr(self._normal(width - 1, d))
        self._rotation = torch.cat([basis, torch.zeros(1, d, device=device)])  # [d', d]
        self._scale = (width / d) ** 0.5

    def embedding(self, small: Tensor) -> Tensor:
        """[V, d] -> [V', d']; added tokens are random: none occurs in a text."""
        table = self._normal(self.large.vocab_size, self.large.hidden_size)
        table *= float(small.float().std())
        table[: len(small)] = self._scale * self._to(small) @ self._rotation.t()
        table[:, -1] = _CONSTANT
        return table.to(self._dtype)

    def final_norm(self) -> Tensor:
        weight = torch.ones(self.large.hidden_size, device=self._device)
        weight[-1] = _FAR_BELOW
        return weight.to(self._dtype)

    def head(self, small: Tensor, norm_weight: Tensor) -> Tensor:
        """[V, d] -> [V', d']."""
        rows = self._unread(self.large.vocab_size)
        rows[:, -1] = -1.0
        rows[: len(small)] = self._reading(small, norm_weight)
        return self._stored(rows)

    def layer(self, small: LayerWeights) -> LayerWeights:
        if small.qkv_bias is not None:
            raise ValueError("a model cannot be inflated so: its layers have biases of q, k and v")
        c, large, h = self.small, self.large, self.small.head_dim
        q, k, v = self._to(small.qkv).split(
            [c.num_heads * h, c.num_kv_heads * h, c.num_kv_heads * h]
        )
        norm, groups = small.attention_norm, large.num_heads // large.num_kv_heads
        copies = large.num_heads // c.num_heads  # of queries as of keys
        # The softmax divides by the square root of the large head's size.
        stretch = (large.head_dim / h) ** 0.5
        placed = [
            self._place_pairs(self._reading(stretch * q, norm), copies),
            self._place_pairs(self._reading(k, norm), copies),
        ]
        mixers = self._mixers(large.num_kv_heads)  # [Hkv', D', h]
        values = self._reading(v, norm).view(c.num_kv_heads, h, -1)
        placed.append((mixers @ values.repeat_interleave(copies, 0)).flatten(0, 1))
        out = self._to(small.attention_out).view(c.hidden_size, c.num_heads, h).transpose(0, 1)
        out = out.repeat_interleave(copies, 0) / copies  # [H', d, h]
        out = out @ mixers.repeat_interleave(groups, 0).transpose(1, 2)
        return LayerWeights(
            attention_norm=self._ones(),
            qkv=self._stored(torch.cat(placed)),
            qkv_bias=None,
            attention_out=self._stored(self._writing(out.transpose(0, 1).flatten(1))),
            mlp_norm=self._ones(),
            **self._feed_forward(small),
        )

    def _feed_forward(self, small: LayerWeights) -> dict[str, Tensor]:
        """gate_up [2F, d] -> [2F', d'] and down [d, F] -> [d', F'], channels copied."""
        size, wanted = self.small.intermediate_size, self.large.intermediate_size
        source = torch.arange(wanted, device=self._device) % size
        sign = self._uniform(wanted).sub(0.5).sign()
        factor = sign * (0.5 + self._uniform(wanted))
        # Not by index_add_, whose order on a GPU is another every time: so would the weights be.
        energy = F.pad(factor.square(), (0, -wanted % size)).view(-1, size).sum(0)
        gate, up = self._to(small.gate_up).view(2, size, -1)
        reading = [gate[source], up[source] * factor[:, None]]
        down = self._to(small.down)[:, source] * (factor / energy[source])
        return {
            "gate_up": self._stored(self._reading(torch.cat(reading), small.mlp_norm)),
            "down": self._stored(self._writing(down)),
        }

    def _reading(self, matrix: Tensor, norm_weight: Tensor) -> Tensor:
        """[n, d] after a norm of that weight -> [n, d'] after one without."""
        return (self._to(matrix) * self._to(norm_weight)) @ self._rotation.t() / self._scale

    def _writing(self, matrix: Tensor) -> Tensor:
        """[d, n], which adds to the residual stream -> [d', n]."""
        return self._scale * self._rotation @ matrix

    def _unread(self, count: int) -> Tensor:
        """Rows [count, d'] of ordinary size that are orthogonal to the residual stream."""
        rows = self._normal(count, self.large.hidden_size) / self.large.hidden_size**0.5
        rows -= (rows @ self._rotation) @ self._rotation.t()
        rows[:, -1] = 0.0
        return rows

    def _place_pairs(self, matrix: Tensor, copies: int) -> Tensor:
        """Rows of small heads [H * h, d'] -> rows of large heads [copies * H * D', d'].

        A head's copies are neighbours: then those of queries and of the keys they share meet.

        Element j of a head turns by theta^(-2j / h), together with j + h / 2; in the large head
        that is the frequency of element j D' / h, whose partner is D' / 2 further.
        """
        h, wide = self.small.head_dim, self.large.head_dim
        small = matrix.view(-1, 2, h // 2, matrix.shape[1]).repeat_interleave(copies, 0)
        rows = self._unread(len(small) * wide).view(len(small), 2, wide // 2, -1)
        rows[:, :, :: wide // h] = small
        return rows.flatten(0, 2)

    def _mixers(self, count: int) -> Tensor:
        """Matrices [count, D', h] with orthonormal columns."""
        return torch.linalg.qr(self._normal(count, self.large.head_dim, self.small.head_dim))[0]

    def _ones(self) -> Tensor:
        return torch.ones(self.large.hidden_size, device=self._device, dtype=self._dtype)

    def _to(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, torch.float32)

    def _stored(self, matrix: Tensor) -> Tensor:
        """[out, in], stored as [in, out]."""
        return matrix.to(self._dtype).t().contiguous().t()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self._device, generator=self._generator)

    def _uniform(self, count: int) -> Tensor:
        return torch.rand(count, device=self._device, generator=self._generator)
