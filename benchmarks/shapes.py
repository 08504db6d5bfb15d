"""Models of a given shape with random weights, made on the device they run on."""

from __future__ import annotations

import torch
from elastic_cache.config import ModelConfig
from elastic_cache.models.inflate import LLADA_8B
from elastic_cache.models.weights import LayerWeights, Model, ModelWeights, rope_table

SHAPES = {
    "llada-8b": LLADA_8B,
    "small": ModelConfig(
        architecture="llada",
        hidden_size=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=64,
        intermediate_size=768,
        vocab_size=1024,
        max_length=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_embeddings=False,
        mask_id=1,
        eos_id=2,
    ),
}


def random_model(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Model:
    """A model of the shape `name` whose activations stay near unit size through all layers."""
    config = SHAPES[name]
    generator = torch.Generator(device=device).manual_seed(seed)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.empty(columns, rows, dtype=dtype, device=device)
        return values.normal_(0.0, scale / columns**0.5, generator=generator).t()

    def norm() -> torch.Tensor:
        weight = torch.empty(config.hidden_size, dtype=dtype, device=device)
        return weight.uniform_(0.5, 1.5, generator=generator)

    d, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    depth_scale = (2.0 * config.num_layers) ** -0.5
    layers = tuple(
        LayerWeights(
            attention_norm=norm(),
            qkv=matrix(q + 2 * kv, d),
            qkv_bias=None,
            attention_out=matrix(d, q, depth_scale),
            mlp_norm=norm(),
            gate_up=matrix(2 * ffn, d),
            down=matrix(d, ffn, depth_scale),
        )
        for _ in range(config.num_layers)
    )
    embedding = torch.empty(config.vocab_size, d, dtype=dtype, device=device)
    weights = ModelWeights(
        embedding=embedding.normal_(generator=generator),
        layers=layers,
        final_norm=norm(),
        head=matrix(config.vocab_size, d),
        rope=rope_table(config.max_length, config.head_dim, config.rope_theta).to(device),
    )
    return Model(name, config, weights, None, device, dtype)
