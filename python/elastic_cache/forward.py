"""Runs one planned step through the layers: a plan and a cache in, hidden rows out.

    reuse layer   the plan's rows only, against all cached keys; then the drift test
    full layer    every position; its inputs are the previous full layer's output, or, in the
                  first full layer of a step, the layer's own cached inputs
The subtle thing: reuse layers run on after a failed drift test wherever looking at the verdict
would cost a device synchronisation. That is harmless: all they write belongs to layers which the
full pass then overwrites. On the CPU looking is free, and the pass stops early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from elastic_cache import ops
from elastic_cache.cache import Cache
from elastic_cache.models.weights import Model
from elastic_cache.plan import DriftTest, Plan
from elastic_cache.state import DecodeState


@dataclass(frozen=True)
class LayerMatrices:
    """A block's weights as the right-hand side of products, [in, out]."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    attention_out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


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
    def allocate(cls, model: Model, num_rows: int) -> Workspace:
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
                device=model.device,
                dtype=torch.float32 if name == "lse" else model.dtype,
            )
            for name, shape in shapes.items()
        }
        return cls(**buffers, attention_flat=buffers["attention"].flatten(1))

    def rows(self, num_rows: int) -> Workspace:
        """The same buffers cut to their first `num_rows` rows."""
        return Workspace(**{name: buffer[:num_rows] for name, buffer in vars(self).items()})


class Forward:
    """The layers of a model over one request's cache.

    Args:
        model: weights and shape.
        cache: storage of the request; its capacity bounds the rows of a step.
    """

    def __init__(self, model: Model, cache: Cache) -> None:
        config, weights = model.config, model.weights
        self._weights = weights
        self._cache = cache
        self._eps = config.rms_norm_eps
        self._scale = 1.0 / math.sqrt(config.head_dim)
        self._can_peek = model.device.type == "cpu"
        self._layers = tuple(
            LayerMatrices(
                layer.attention_norm,
                layer.qkv.t(),
                layer.qkv_bias,
                layer.attention_out.t(),
                layer.mlp_norm,
                layer.gate_up.t(),
                layer.down.t(),
            )
            for layer in weights.layers
        )
        slots = cache.num_sequences * cache.capacity
        self._workspace = Workspace.allocate(model, slots)
        self._all_slots = torch.arange(slots, dtype=torch.int32, device=model.device)

    def run(self, plan: Plan, state: DecodeState) -> tuple[torch.Tensor, int]:
        """Runs every layer for the plan's rows.

        Returns the normalised hidden rows of the candidates, [W, d], and the first layer that ran
        in full mode (0 for a full plan, the number of layers when none did).
        """
        depth = len(self._layers)
        first_full = 0
        if not plan.is_full:
            work = self._workspace.rows(plan.rows.numel())
            self._embed(state, plan.rows, work)
            first_full = self._run_reuse_layers(plan, state, work)
        if first_full < depth:
            work, candidate_rows = self._workspace, plan.candidates.long()
            if plan.is_full:
                self._embed(state, self._all_slots, work)
            self._run_full_layers(first_full, plan, state)
        else:
            candidate_rows = plan.candidate_rows
        residual = work.residual[candidate_rows]
        hidden = torch.empty_like(residual)
        ops.add_rms_norm(
            residual,
            work.delta[candidate_rows],
            self._weights.final_norm,
            self._eps,
            hidden,
            None,
            None,
        )
        return hidden, first_full

    def _embed(self, state: DecodeState, rows: torch.Tensor, work: Workspace) -> None:
        tokens = state.tokens.view(-1).index_select(0, rows)
        torch.index_select(self._weights.embedding, 0, tokens, out=work.residual)

    def _run_reuse_layers(self, plan: Plan, state: DecodeState, work: Workspace) -> int:
        """Layers over the plan's rows; returns the first layer to run in full mode."""
        depth, drift = len(self._layers), plan.drift
        verdict = drift.first_full_layer.numpy() if drift and self._can_peek else None
        for index, layer in enumerate(self._layers):
            if verdict is not None and verdict.max() <= index:
                self._store_input(index, plan.rows, work)
                return index
            self._project_qkv(index, plan.rows, work, is_first=index == 0)
            if drift is None:
                self._attend(index, plan.rows, state, work)
            else:
                self._attend_and_test(index, plan.rows, drift.row_segments, drift, state, work)
            self._finish_layer(layer, work.attention_flat, work)
        if drift is None or verdict is not None:
            return depth
        return int(drift.first_full_layer.min())

    def _run_full_layers(self, first: int, plan: Plan, state: DecodeState) -> None:
        """Layers `first` .. L - 1 over every position."""
        work = self._workspace
        for index in range(first, len(self._layers)):
            cached = self._cache.layers[index]
            if index == first and not plan.is_full:
                assert cached.x is not None  # a plan that can fail caches inputs
                work.residual.copy_(cached.x)
            self._project_qkv(index, self._all_slots, work, is_first=index == first)
            # [N, H, D] -> [1, H, N, D]: one sequence; torch's kernel, as the vendor's is fastest.
            q, k, v = (t.transpose(0, 1)[None] for t in (cached.q, cached.k, cached.v))
            out = F.scaled_dot_product_attention(
                q, k, v, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            attention = out[0].transpose(0, 1).reshape(work.attention_flat.shape)
            if plan.drift is not None:
                self._track_full(index, plan, plan.drift, state)
            self._finish_layer(self._layers[index], attention, work)

    def _store_input(self, index: int, rows: torch.Tensor, work: Workspace) -> None:
        """Adds the previous layer's output and stores the sum: where the full layers start."""
        ops.add_rms_norm(
            work.residual,
            work.delta,
            self._layers[index].attention_norm,
            self._eps,
            work.hidden,
            rows,
            self._cache.layers[index].x,
        )

    def _project_qkv(
        self, index: int, rows: torch.Tensor, work: Workspace, *, is_first: bool
    ) -> None:
        """Adds the previous layer's output, unless this layer is the first to run, stores the
        layer's input, and writes q, k, v of the rows into the cache; what they overwrite goes to
        q_old, k_old."""
        layer, cached = self._layers[index], self._cache.layers[index]
        ops.project_qkv(
            work.residual,
            None if is_first else work.delta,
            layer.attention_norm,
            self._eps,
            layer.qkv,
            layer.qkv_bias,
            rows,
            self._weights.rope,
            self._cache.capacity,
            cached.x,
            cached.q,
            cached.k,
            cached.v,
            work.q_old,
            work.k_old,
            work.hidden,
            work.qkv,
        )

    def _finish_layer(self, layer: LayerMatrices, attention: torch.Tensor, work: Workspace) -> None:
        """Output projection and feed-forward block; what the latter adds is left in `delta`."""
        ops.output_mlp(
            attention,
            layer.attention_out,
            work.residual,
            layer.mlp_norm,
            self._eps,
            layer.gate_up,
            layer.down,
            work.hidden,
            work.gate_up,
            work.activation,
            work.delta,
        )

    def _attend(self, index: int, rows: torch.Tensor, state: DecodeState, work: Workspace) -> None:
        cached = self._cache.layers[index]
        ops.window_attention(
            cached.q,
            cached.k,
            cached.v,
            rows,
            state.key_range,
            self._scale,
            work.attention,
            work.lse,
        )

    def _attend_and_test(
        self,
        index: int,
        rows: torch.Tensor,
        segments: torch.Tensor,
        drift: DriftTest,
        state: DecodeState,
        work: Workspace,
    ) -> None:
        cached = self._cache.layers[index]
        ops.drift_attention(
            cached.q,
            cached.k,
            cached.v,
            work.q_old,
            work.k_old,
            rows,
            segments,
            state.key_range,
            self._scale,
            work.attention,
            work.lse,
            drift.mass,
            drift.similarity,
        )
        ops.drift_decision(
            drift.similarity,
            drift.gamma,
            drift.mass,
            drift.masked,
            state.key_range,
            index,
            drift.first_full_layer,
            drift.tracked[index],
        )

    def _track_full(self, index: int, plan: Plan, drift: DriftTest, state: DecodeState) -> None:
        """Tracked-token choice of a full layer: attention of the window's rows once more.

        torch's attention keeps no weights; W rows beside all of them cost a few per cent.
        """
        work = self._workspace.rows(plan.candidates.numel())
        self._attend_and_test(index, plan.candidates, drift.window_segments, drift, state, work)
