"""The small LLaDA as a trainable network, and its checkpoint folder.

    x = embedding[ids];  per block: x += attention(norm(x));  x += swiglu(norm(x));  head(norm(x))

Module names are LLaDA's tensor names less the prefix "model.transformer.". The subtle thing: the
head runs only on the rows that are asked for, because a masked sequence has few targets.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

_PREFIX = "model.transformer."


class Block(nn.Module):
    """One layer: [B, T, d] -> [B, T, d]."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        d, ffn, eps = config["d_model"], config["mlp_hidden_size"], config["rms_norm_eps"]
        self.num_heads = config["n_heads"]
        self.attn_norm, self.ff_norm = nn.RMSNorm(d, eps=eps), nn.RMSNorm(d, eps=eps)
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (
            nn.Linear(d, d, bias=False) for _ in range(4)
        )
        self.ff_proj, self.up_proj = (nn.Linear(d, ffn, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(ffn, d, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        keys: torch.Tensor | None,
    ) -> torch.Tensor:
        """cos, sin [T, head_dim] float32; keys bool [B, 1, 1, T], which keys exist; None = all."""
        b, n, d = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            proj(h).view(b, n, self.num_heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=keys)
        x = x + self.attn_out(o.transpose(1, 2).reshape(b, n, d))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class Network(nn.Module):
    """The model of a config.json in LLaDA's fields (RMS norm, SwiGLU, RoPE, untied, no GQA)."""

    def __init__(self, config: dict, max_length: int) -> None:
        super().__init__()
        d, vocab, depth = config["d_model"], config["vocab_size"], config["n_layers"]
        self.wte = nn.Embedding(vocab, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(depth))
        self.ln_f = nn.RMSNorm(d, eps=config["rms_norm_eps"])
        self.ff_out = nn.Linear(d, vocab, bias=False)
        head_dim = d // config["n_heads"]
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        inv_freq = 1.0 / (config["rope_theta"] ** exponents)
        angles = torch.outer(torch.arange(max_length, dtype=torch.float), inv_freq)
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def initialise(self, seed: int) -> None:
        """Random weights; what adds to the residual stream is scaled down by its depth."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                continue
            is_residual = "blocks" in name and name.endswith(("attn_out.weight", "ff_out.weight"))
            fan = p.shape[1] * (2 * len(self.blocks) if is_residual else 1)
            nn.init.normal_(p, 0, 0.02 if "wte" in name else fan**-0.5, generator=generator)

    def forward(
        self, ids: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [M, vocab] of `rows` [M], flat indices into ids [B, T]."""
        n = ids.shape[1]
        # As a product with one-hot rows, because the gradient of a look-up is slow to sum up in a
        # fixed order; exact in float32.
        one_hot = ids[..., None] == torch.arange(len(self.wte.weight), device=ids.device)
        x = (one_hot.to(self.wte.weight.dtype) @ self.wte.weight).float()
        cos, sin = self.cos[:n], self.sin[:n]
        for block in self.blocks:
            x = block(x, cos, sin, keys)
        return self.ff_out(self.ln_f(x.flatten(0, 1)[rows]))


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_network(folder: Path, max_length: int) -> Network:
    """A network in float32 from a checkpoint folder."""
    network = Network(read_config(folder), max_length)
    tensors = load_file(folder / "model.safetensors")
    network.load_state_dict({k.removeprefix(_PREFIX): v.float() for k, v in tensors.items()})
    return network


def save_network(network: Network, folder: Path, like: Path) -> None:
    """A checkpoint folder in bfloat16, with the config and the tokenizer of the folder `like`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _PREFIX + name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in network.state_dict().items()
    }
    if not all(math.isfinite(t.float().sum().item()) for t in tensors.values()):
        raise ValueError("the weights are not finite: training diverged, nothing was written")
    unfinished = folder / "model.safetensors.partial"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.replace(folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        if folder.resolve() != like.resolve():
            shutil.copyfile(like / name, folder / name)
