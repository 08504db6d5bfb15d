"""A LLaDA forward in plain torch, straight from a checkpoint folder, in float32 or float64.

One layer is three functions (`qkv`, `attention`, `finish_layer`) because the policies differ in
what happens between them. The subtle thing: the RoPE table is made in float32, as LLaDA's code
makes it, and then widened, so that a float64 oracle judges the same rotation angles.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

LLADA_NAMES = {
    "attn_norm": "model.transformer.blocks.{}.attn_norm.weight",
    "ff_norm": "model.transformer.blocks.{}.ff_norm.weight",
    "q": "model.transformer.blocks.{}.q_proj.weight",
    "k": "model.transformer.blocks.{}.k_proj.weight",
    "v": "model.transformer.blocks.{}.v_proj.weight",
    "o": "model.transformer.blocks.{}.attn_out.weight",
    "gate": "model.transformer.blocks.{}.ff_proj.weight",
    "up": "model.transformer.blocks.{}.up_proj.weight",
    "down": "model.transformer.blocks.{}.ff_out.weight",
    "embedding": "model.transformer.wte.weight",
    "final_norm": "model.transformer.ln_f.weight",
    "head": "model.transformer.ff_out.weight",
}
LLAMA_NAMES = {
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "ff_norm": "model.layers.{}.post_attention_layernorm.weight",
    "q": "model.layers.{}.self_attn.q_proj.weight",
    "k": "model.layers.{}.self_attn.k_proj.weight",
    "v": "model.layers.{}.self_attn.v_proj.weight",
    "o": "model.layers.{}.self_attn.o_proj.weight",
    "gate": "model.layers.{}.mlp.gate_proj.weight",
    "up": "model.layers.{}.mlp.up_proj.weight",
    "down": "model.layers.{}.mlp.down_proj.weight",
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}
LAYER_KEYS = ("attn_norm", "ff_norm", "q", "k", "v", "o", "gate", "up", "down")


@dataclass
class OracleModel:
    """Weights by short name (`q.3`, `embedding`) and the few numbers a forward needs."""

    tensors: dict[str, torch.Tensor]
    num_layers: int
    num_heads: int
    num_kv_heads: int
    rope_theta: float
    eps: float
    mask_id: int
    eos_id: int
    max_length: int

    def __post_init__(self) -> None:
        dim = self.tensors["q.0"].shape[0] // self.num_heads
        exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        places = torch.arange(self.max_length, dtype=torch.float32)
        angles = torch.outer(places, 1.0 / self.rope_theta**exponents)
        angles = torch.cat((angles, angles), -1)
        self.cos, self.sin = angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["embedding"].dtype

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.tensors["embedding"][ids]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        # The oracle runs in float32 or float64, so the cast back to the model's dtype is no step.
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.tensors[name]

    def qkv(
        self, layer: int, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [n, d] at `positions` [n] -> q [n, H, D], k and v [n, H_kv, D], RoPE applied."""
        h = self.norm(x, f"attn_norm.{layer}")
        q = (h @ self.tensors[f"q.{layer}"].T).unflatten(-1, (self.num_heads, -1))
        k = (h @ self.tensors[f"k.{layer}"].T).unflatten(-1, (self.num_kv_heads, -1))
        v = (h @ self.tensors[f"v.{layer}"].T).unflatten(-1, (self.num_kv_heads, -1))
        return self.rotate(q, positions), self.rotate(k, positions), v

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return x * self.cos[positions, None] + turned * self.sin[positions, None]

    def weights(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """q [n, H, D], keys [T, H_kv, D] -> attention weights [H, n, T]; no mask."""
        keys = keys.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        scores = torch.einsum("nhd,thd->hnt", q, keys) / q.shape[-1] ** 0.5
        return torch.softmax(scores, -1)

    def finish_layer(
        self, layer: int, x: torch.Tensor, weights: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Weighted values, output projection, residual, SwiGLU, residual: [n, d] -> [n, d]."""
        values = values.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        mixed = torch.einsum("hnt,thd->nhd", weights, values).flatten(1)
        x = x + mixed @ self.tensors[f"o.{layer}"].T
        h = self.norm(x, f"ff_norm.{layer}")
        gate = torch.nn.functional.silu(h @ self.tensors[f"gate.{layer}"].T)
        return x + (gate * (h @ self.tensors[f"up.{layer}"].T)) @ self.tensors[f"down.{layer}"].T

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x, "final_norm") @ self.tensors["head"].T

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Plain forward of a whole sequence: ids [T] -> logits [T, vocab]."""
        x = self.embed(ids)
        positions = torch.arange(len(ids))
        for layer in range(self.num_layers):
            q, k, v = self.qkv(layer, x, positions)
            x = self.finish_layer(layer, x, self.weights(q, k), v)
        return self.logits(x)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float64) -> OracleModel:
    """Read a checkpoint folder (one file or shards) in either tensor-name scheme."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored.update(load_file(file))
    names = LLADA_NAMES if LLADA_NAMES["embedding"] in stored else LLAMA_NAMES
    tensors = {key: stored[names[key]].to(dtype) for key in ("embedding", "final_norm")}
    for layer in range(config["n_layers"]):
        for key in LAYER_KEYS:
            tensors[f"{key}.{layer}"] = stored[names[key].format(layer)].to(dtype)
    tied = config.get("weight_tying", False)
    tensors["head"] = tensors["embedding"] if tied else stored[names["head"]].to(dtype)
    return OracleModel(
        tensors=tensors,
        num_layers=config["n_layers"],
        num_heads=config["n_heads"],
        num_kv_heads=config.get("n_kv_heads") or config["n_heads"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
        mask_id=config["mask_token_id"],
        eos_id=config["eos_token_id"],
        max_length=config["max_sequence_length"],
    )
