"""Rows into the cache, their attention, and the drift test. What the letters mean: `ops`."""

from __future__ import annotations

from torch import Tensor

from elastic_cache.native import kernel

_cache_write = kernel("cache_write")
_window_attention = kernel("window_attention")
_drift_attention = kernel("drift_attention")
_drift_statistics = kernel("drift_statistics")
_drift_decision = kernel("drift_decision")


def cache_write(
    qkv: Tensor,
    rows: Tensor,
    rope: Tensor,
    capacity: int,
    segments: Tensor | None,
    q_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_old: Tensor | None,
    k_old: Tensor | None,
) -> None:
    """Rotate the queries and keys of the rows (RoPE, NeoX halves, float32) at their positions and
    store q, k, v in the cache; first save what is overwritten, for the drift test.

    Args:
        qkv: model [R, (H + 2 Hkv) * D], q heads, k heads, v heads; rows may be any distance apart.
        rows: int32 [R].
        rope: float32 [at least C, D], D/2 cosines, then D/2 sines of each position.
        capacity: C; position = slot % C.
        segments: int32 [S, 5]: save queries of tracked rows alone; or None: of every row.
        q_cache: in and out, model [N, H, D].
        k_cache: in and out, model [N, Hkv, D].
        v_cache: in and out, model [N, Hkv, D].
        q_old: out, model [R, H, D], or None.
        k_old: out, model [R, Hkv, D], or None.

    Raises:
        ValueError: a wrong argument.

    Source: RoFormer (arXiv 2104.09864) for the rotation; the saved rows replace the copy of the
    whole K cache in the paper's code.
    """
    _cache_write(qkv, rows, rope, capacity, segments, q_cache, k_cache, v_cache, q_old, k_old)


def window_attention(
    q_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    segments: Tensor | None,
    key_range: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Attention of the rows over all keys in their sequence's range, without a mask.

    Args:
        q_cache: model [N, H, D]; queries are read at the rows' slots.
        k_cache: model [N, Hkv, D].
        v_cache: model [N, Hkv, D].
        rows: int32 [R].
        segments: int32 [S, 5]: rows lie sequence by sequence as it says, from row 0 on, and behind
            them none is valid; or None: they lie in any order. For several sequences a GPU takes
            1.5 to 3.5 times as long without it; for one it makes no difference.
        key_range: int32 [S, 2].
        scale: factor of the scores, usually 1 / sqrt(D).
        out: out, model [R, H, D].
        lse: out, float32 [R, H], natural logarithm of the sum of exp(score).

    Raises:
        ValueError: a wrong argument.

    Source: FlashAttention (arXiv 2205.14135) for the log-sum-exp form.
    """
    _window_attention(q_cache, k_cache, v_cache, rows, segments, key_range, scale, out, lse)


def drift_attention(
    q_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_old: Tensor | None,
    k_old: Tensor | None,
    rows: Tensor,
    segments: Tensor,
    key_range: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    similarity: Tensor,
) -> None:
    """`window_attention` and `drift_statistics` of one layer.

    On the CPU one sweep over the keys serves both. On a GPU it is faster to call `window_attention`
    in every layer and `drift_statistics` once for all of them.

    Args:
        q_cache: model [N, H, D], after this layer's rows were written.
        k_cache: model [N, Hkv, D], likewise.
        v_cache: model [N, Hkv, D], likewise.
        q_old: model [R, H, D], the overwritten queries; None when no sequence has tracked rows.
        k_old: model [R, Hkv, D], the overwritten keys; None likewise.
        rows: int32 [R].
        segments: int32 [S, 5]; rows lie as `window_attention` says.
        key_range: int32 [S, 2].
        scale: factor of the scores, usually 1 / sqrt(D).
        out: out, model [R, H, D], as `window_attention` gives it.
        lse: out, float32 [R, H], likewise.
        mass: out, float32 [S, C], as `drift_statistics` gives it.
        similarity: out, float64 [S], likewise.

    Raises:
        ValueError: a wrong argument.

    Source: as of the two.
    """
    _drift_attention(
        q_cache, k_cache, v_cache, q_old, k_old, rows, segments, key_range, scale,
        out, lse, mass, similarity,
    )  # fmt: skip


def drift_statistics(
    q_cache: Tensor,
    k_cache: Tensor,
    q_old: Tensor | None,
    k_old: Tensor | None,
    lse: Tensor | None,
    rows: Tensor,
    segments: Tensor,
    key_range: Tensor,
    scale: float,
    mass: Tensor,
    similarity: Tensor,
) -> None:
    """How much attention every key gets from the window, and how far attention has drifted; for n
    consecutive layers at once.

    mass[l, s, k] sums the attention of all heads and window rows to key k; similarity[l, s] is the
    mean over (tracked row, key) of the cosine, over the HEAD axis, between the attention weights
    before and after the layer's rows were written; +infinity without tracked rows.

    Args:
        q_cache: model [n, N, H, D], after the layers' rows were written.
        k_cache: model [n, N, Hkv, D], likewise.
        q_old: model [n, at least R, H, D], the overwritten queries, of the first R rows; None when
            no sequence has tracked rows.
        k_old: model [n, as q_old, Hkv, D], the overwritten keys; None likewise.
        lse: float32 [n, as q_old, H], what `window_attention` gave the rows in every layer; None to
            compute it again. On a GPU it saves time; the CPU needs none and does not read it.
        rows: int32 [R].
        segments: int32 [S, 5].
        key_range: int32 [S, 2].
        scale: factor of the scores, usually 1 / sqrt(D).
        mass: out, float32 [n, S, C]; 0 outside of the key range.
        similarity: out, float64 [n, S].

    Raises:
        ValueError: a wrong argument.

    Source: the paper's drift test and most-attended token, as its code computes them.
    """
    _drift_statistics(
        q_cache, k_cache, q_old, k_old, lse, rows, segments, key_range, scale, mass, similarity
    )


def drift_decision(
    similarity: Tensor,
    gamma: Tensor,
    mass: Tensor,
    masked: Tensor,
    key_range: Tensor,
    layer: int,
    first_full_layer: Tensor,
    tracked: Tensor,
) -> None:
    """Let layers behind one whose drift test fails run in full mode, and choose the tokens that
    the next step recomputes; for n consecutive layers at once.

    Args:
        similarity: float64 [n, S].
        gamma: float64 [S]; a similarity below it fails the test.
        mass: float32 [n, S, C].
        masked: bool [S, C] before this step's commit; masked positions are never chosen.
        key_range: int32 [S, 2].
        layer: index of the first of the layers.
        first_full_layer: in and out, int32 [S]; lowered to the first failing layer's index + 1.
        tracked: out, int32 [n, S, k], positions of largest mass, best first, padded with -1.

    Raises:
        ValueError: a wrong argument.

    Source: the paper's layer-wise trigger.
    """
    _drift_decision(similarity, gamma, mass, masked, key_range, layer, first_full_layer, tracked)
