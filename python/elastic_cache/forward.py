"""Runs rows through the layers of a model, against a cache.

    run_rows   the listed rows only, against all cached keys; and the drift test
    run_full   every position; its inputs are the previous full layer's output, or, in the first
               full layer of a step, the layer's own cached inputs
The subtle thing: run_rows goes on after a failed drift test wherever looking at the verdict would
cost a device synchronisation. That is harmless: all it writes belongs to layers which the full pass
then overwrites. On the CPU looking is free, and the pass stops early.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic_cache import ops
from elastic_cache.buffers import OverwrittenRows, Workspace
from elastic_cache.cache import Cache
from elastic_cache.models.weights import Model
from elastic_cache.state import DecodeState, DriftTest


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


class Forward:
    """The layers of a model over one runner's cache.

    Args:
        model: weights and shape.
        cache: storage; its capacity bounds the positions of a full pass.
        max_rows: the most rows of a pass.
        max_deferred: a pass of at most so many rows tests the drift of all layers after the last
            one, which a GPU does fastest; others test every layer as they come to it.
        batch_invariant: in `run_rows` no bit of a row depends on the rows beside it.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        max_rows: int,
        max_deferred: int,
        batch_invariant: bool,
    ) -> None:
        config, weights = model.config, model.weights
        self._weights = weights
        self._cache = cache
        self._batch_invariant = batch_invariant
        self._eps = config.rms_norm_eps
        self._scale = 1.0 / math.sqrt(config.head_dim)
        self._can_peek = model.device.type == "cpu"
        # External: a pass that is captured records it whenever it is replayed.
        self._nearly_over = torch.cuda.Event(external=True) if model.device.type == "cuda" else None
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
        self._workspace = Workspace.allocate(model, max_rows, model.device)
        self._overwritten = (
            OverwrittenRows.allocate(model, max_deferred, model.device) if max_deferred else None
        )
        self._all_slots = torch.arange(slots, dtype=torch.int32, device=model.device)

    def run_rows(
        self,
        rows: torch.Tensor,
        segments: torch.Tensor,
        state: DecodeState,
        drift: DriftTest | None,
    ) -> bool:
        """Layers over the listed rows, int32 [R], against the cache; tests each if `drift`.

        Returns False when it stopped at a layer that has to run in full mode; only a pass that can
        look at the verdict for free does so.
        """
        work = self._workspace.rows(len(rows))
        self._embed(state, rows, work)
        overwritten = self._overwritten if drift is not None else None
        if overwritten is not None and len(rows) > overwritten.q.shape[1]:
            overwritten = None
        looks = drift is not None and overwritten is None and self._can_peek
        verdict = state.first_full_layer.numpy() if looks else None
        # Of a single sequence a plan may have listed the rows, and then segments does not say them.
        places = segments if self._cache.num_sequences > 1 else None
        for index, layer in enumerate(self._layers):
            if verdict is not None and max(verdict.tolist()) <= index:
                self._store_input(index, rows, work)
                return False
            self._record(index)
            q_old, k_old, lse = None, None, work.lse
            if overwritten is not None:
                q_old, k_old, lse = (x[index, : len(rows)] for x in vars(overwritten).values())
            elif drift is not None:
                q_old, k_old = work.q_old, work.k_old
            self._project_qkv(
                index, rows, work, segments, q_old, k_old, self._batch_invariant, index == 0
            )
            if drift is None or overwritten is not None:
                self._attend(index, rows, places, state, work.attention, lse)
            else:
                self._attend_and_test(index, rows, segments, drift, state, work)
                if verdict is not None:
                    self._decide(index, index + 1, drift, state)
            self._finish_layer(layer, work.attention_flat, work, self._batch_invariant)
        if drift is not None and verdict is None:
            if overwritten is not None:
                self._test(0, rows, segments, drift, state, overwritten)
            self._decide(0, len(self._layers), drift, state)
        return True

    def run_full(self, first: int, end: int, begin: int, length: int, state: DecodeState) -> None:
        """Layers `first` .. `end` - 1 over the `length` slots from `begin` on, a sequence's.

        Layer 0 begins with the tokens, another one with the inputs that its cache holds; where
        there is a layer `end`, its inputs are left there.
        """
        work = self._workspace.rows(length)
        slots = self._all_slots[begin : begin + length]
        if first == 0:
            self._embed(state, slots, work)
        else:
            inputs = self._cache.layers[first].x
            assert inputs is not None  # a plan that can fail caches inputs
            work.residual.copy_(inputs[begin : begin + length])
        with _attention_kernels(slots.device):
            for index in range(first, end):
                self._record(index)
                # A sequence's own: there are no rows of others beside it.
                self._project_qkv(index, slots, work, None, None, None, False, index == first)
                attention = self._attend_all(index, slots, state, work)
                self._finish_layer(self._layers[index], attention, work, False)
        if end < len(self._layers):
            self._store_input(end, slots, work)

    def track_full(
        self,
        first: int,
        candidates: torch.Tensor,
        segments: torch.Tensor,
        state: DecodeState,
        drift: DriftTest,
    ) -> None:
        """After a full pass: layers `first` .. L - 1 choose their tracked tokens by the attention
        of the candidates, int32 [R], which torch's attention does not tell."""
        self._test(first, candidates, segments, drift, state, None)
        self._decide(first, len(self._layers), drift, state)

    def hidden(self, index: torch.Tensor) -> torch.Tensor:
        """Normalised output [W, d] of rows `index` of the last pass, int32 [W]; -1 gives any."""
        # Indexing: on a GPU torch's index_select of up to 16 rows takes three times as long.
        work, at = self._workspace, index.clamp(min=0).long()
        residual = work.residual[at]
        hidden = torch.empty_like(residual)
        ops.add_rms_norm(
            residual,
            work.delta[at],
            self._weights.final_norm,
            self._eps,
            hidden,
            None,
            None,
        )
        return hidden

    def wait_nearly(self) -> None:
        """Waits until of the pass enqueued last an eighth of the layers are left, or fewer."""
        if self._nearly_over is not None:
            self._nearly_over.synchronize()

    def _record(self, index: int) -> None:
        """When an eighth of the layers are left, `index` the first of them."""
        depth = len(self._layers)
        if self._nearly_over is not None and index == depth - max(depth // 8, 1):
            self._nearly_over.record()

    def _embed(self, state: DecodeState, rows: torch.Tensor, work: Workspace) -> None:
        tokens = state.tokens.view(-1).index_select(0, rows.clamp(min=0))
        torch.index_select(self._weights.embedding, 0, tokens, out=work.residual)

    def _attend_all(
        self, index: int, slots: torch.Tensor, state: DecodeState, work: Workspace
    ) -> torch.Tensor:
        """Attention of a sequence's positions over all of them, [T, H * D]: on a GPU torch's."""
        if slots.device.type == "cpu":
            self._attend(index, slots, None, state, work.attention, work.lse)
            return work.attention_flat
        cached, length = self._cache.layers[index], len(slots)
        begin = slots.storage_offset()  # slots are begin, begin + 1, ...
        # [N, H, D] -> [1, H, T, D]
        q, k, v = (
            t[begin : begin + length].transpose(0, 1)[None] for t in (cached.q, cached.k, cached.v)
        )
        out = F.scaled_dot_product_attention(
            q, k, v, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[0].transpose(0, 1).reshape(length, -1)

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
        self,
        index: int,
        rows: torch.Tensor,
        work: Workspace,
        segments: torch.Tensor | None,
        q_old: torch.Tensor | None,
        k_old: torch.Tensor | None,
        batch_invariant: bool,
        is_first: bool,
    ) -> None:
        """Adds the previous layer's output, unless this layer is the first to run, stores the
        layer's input, and writes q, k, v of the rows into the cache; what they overwrite goes to
        q_old (of the segments' tracked rows) and k_old, if given."""
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
            segments,
            cached.x,
            cached.q,
            cached.k,
            cached.v,
            q_old,
            k_old,
            work.hidden,
            work.qkv,
            batch_invariant,
        )

    def _finish_layer(
        self,
        layer: LayerMatrices,
        attention: torch.Tensor,
        work: Workspace,
        batch_invariant: bool,
    ) -> None:
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
            batch_invariant,
        )

    def _attend(
        self,
        index: int,
        rows: torch.Tensor,
        segments: torch.Tensor | None,
        state: DecodeState,
        out: torch.Tensor,
        lse: torch.Tensor,
    ) -> None:
        cached = self._cache.layers[index]
        ops.window_attention(
            cached.q,
            cached.k,
            cached.v,
            rows,
            segments,
            state.key_range,
            self._scale,
            out,
            lse,
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
        cached, tested = self._cache.layers[index], drift.layers[index]
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
            tested.mass,
            tested.similarity,
        )

    def _test(
        self,
        first: int,
        rows: torch.Tensor,
        segments: torch.Tensor,
        drift: DriftTest,
        state: DecodeState,
        overwritten: OverwrittenRows | None,
    ) -> None:
        """Statistics of layers `first` .. L - 1; without `overwritten`, no row may be tracked."""
        ops.drift_statistics(
            self._cache.q[first:],
            self._cache.k[first:],
            None if overwritten is None else overwritten.q[first:],
            None if overwritten is None else overwritten.k[first:],
            None if overwritten is None else overwritten.lse[first:],
            rows,
            segments,
            state.key_range,
            self._scale,
            drift.mass[first:],
            drift.similarity[first:],
        )

    def _decide(self, first: int, end: int, drift: DriftTest, state: DecodeState) -> None:
        """Verdict and tracked tokens of layers `first` .. end - 1."""
        if end == first + 1:
            layer = drift.layers[first]
            similarity, mass, tracked = layer.similarities, layer.masses, layer.tracked
        else:
            similarity, mass = drift.similarity[first:end], drift.mass[first:end]
            tracked = drift.tracked[first:end]
        ops.drift_decision(
            similarity,
            drift.gamma,
            mass,
            state.masked,
            state.key_range,
            first,
            state.first_full_layer,
            tracked,
        )


def _attention_kernels(device: torch.device) -> AbstractContextManager[object]:
    """Which of torch's attention kernels a full pass may take: on a GPU not cuDNN's.

    That one makes a plan for every new length, 50 to 75 ms, where a full pass of 350 positions
    takes 10; it saves 4 us a layer at 340 positions, 23 at 1,024 [an H100, torch 2.11].
    """
    if device.type != "cuda":
        return nullcontext()
    kernels: AbstractContextManager[object] = sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )
    return kernels
