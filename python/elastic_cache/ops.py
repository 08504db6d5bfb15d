"""The native operators, one thin function each; nothing else calls them.

Every op writes into tensors it is given and returns nothing, so a step allocates nothing and its
addresses never change. Importing this module loads the shared object, see native.py.

Letters in the docstrings, as in csrc/include/elastic_cache/types.h:

    S sequences, each owning C (capacity) consecutive slots; N = S * C slots in all;
    slot = sequence * C + position; a row is one token computed in this step, R rows;
    H query heads, Hkv key/value heads (H % Hkv == 0), D head_dim, L layers, W window rows;
    "model" is the model's dtype, float32 or bfloat16, the same for all such arguments of a call.

`rows` is int32 [R], slots; a row whose slot is -1 is skipped and its outputs are zero.
`key_range` is int32 [S, 2], the first and one-past-last position of a sequence that may be read.
`segments` is int32 [S, 5]: where a sequence's rows begin in the row list, then how many of them
are tracked, newly committed, window and lookahead rows.

All tensors are contiguous unless said otherwise and on one device. A wrong argument raises
ValueError with a sentence that names op, argument, rule and what was seen; device, dtype, layout
and shape are checked on every device, the values of indices on the CPU only.

Sources: "Attention Is All You Need for KV Cache in Diffusion LLMs" (arXiv 2510.14973), called the
paper below, and Fast-dLLM (arXiv 2505.22618).
"""

from __future__ import annotations

from torch import Tensor

from elastic_cache.native import kernel

_select_rows = kernel("select_rows")
_refresh_rows = kernel("refresh_rows")
_cache_write = kernel("cache_write")
_window_attention = kernel("window_attention")
_drift_attention = kernel("drift_attention")
_drift_decision = kernel("drift_decision")
_add_rms_norm = kernel("add_rms_norm")
_linear = kernel("linear")
_swiglu = kernel("swiglu")
_project_qkv = kernel("project_qkv")
_output_mlp = kernel("output_mlp")
_token_confidence = kernel("token_confidence")
_commit = kernel("commit")


def select_rows(
    masked: Tensor,
    committed: Tensor,
    tracked: Tensor,
    window: Tensor,
    lookahead: Tensor,
    rows: Tensor,
    segments: Tensor,
    window_rows: Tensor,
) -> None:
    """The rows a step computes: tracked, newly committed, window, lookahead, in this order.

    The window is the leftmost `window` positions still masked, lookahead the next ones: computed,
    but not decoded. A position is listed once, under the first kind that claims it; tracked and
    committed rows are in ascending order.

    Args:
        masked: bool [S, C], positions still masked.
        committed: bool [S, C], positions committed in the previous step.
        tracked: int32 [L, S, k], positions every layer chose in the previous step, -1 = none.
        window: int32 [S], how many masked positions each sequence decodes at once.
        lookahead: int32 [S].
        rows: out, int32 [max_rows], padded with -1.
        segments: out, int32 [S, 5].
        window_rows: out, int32 [max_window], indices into `rows` of the window rows, padded
            with -1.

    Raises:
        ValueError: a wrong argument, or `rows` or `window_rows` is too short.

    Source: the rows of a step in the paper's code; lookahead is an addition.
    """
    _select_rows(masked, committed, tracked, window, lookahead, rows, segments, window_rows)


def refresh_rows(
    first_full_layer: Tensor,
    key_range: Tensor,
    layer: int,
    capacity: int,
    rows: Tensor,
    offsets: Tensor,
) -> None:
    """The rows that run in full mode at `layer`: all positions in the key range of every sequence
    whose `first_full_layer` is at most `layer`.

    Args:
        first_full_layer: int32 [S].
        key_range: int32 [S, 2].
        layer: index of the layer.
        capacity: C.
        rows: out, int32 [max_rows], padded with -1.
        offsets: out, int32 [S + 1]; sequence s owns rows offsets[s] .. offsets[s + 1] - 1.

    Raises:
        ValueError: a wrong argument, or `rows` is too short.

    Source: the paper's depth-selective refresh.
    """
    _refresh_rows(first_full_layer, key_range, layer, capacity, rows, offsets)


def cache_write(
    qkv: Tensor,
    rows: Tensor,
    rope: Tensor,
    capacity: int,
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
    _cache_write(qkv, rows, rope, capacity, q_cache, k_cache, v_cache, q_old, k_old)


def window_attention(
    q_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
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
        key_range: int32 [S, 2].
        scale: factor of the scores, usually 1 / sqrt(D).
        out: out, model [R, H, D].
        lse: out, float32 [R, H], natural logarithm of the sum of exp(score).

    Raises:
        ValueError: a wrong argument.

    Source: FlashAttention (arXiv 2205.14135) for the log-sum-exp form.
    """
    _window_attention(q_cache, k_cache, v_cache, rows, key_range, scale, out, lse)


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
    max_tracked: int,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    similarity: Tensor,
) -> None:
    """`window_attention`; also how much attention every key gets from the window, and how far
    attention has drifted.

    mass[s, k] sums the attention of all heads and window rows to key k; similarity[s] is the mean
    over (tracked row, key) of the cosine, over the HEAD axis, between the attention weights
    before and after this layer's rows were written; +infinity without tracked rows, NaN beyond
    `max_tracked` of them, counted through all sequences.

    Args:
        q_cache: model [N, H, D], after this layer's rows were written.
        k_cache: model [N, Hkv, D], likewise.
        v_cache: model [N, Hkv, D], likewise.
        q_old: model [R, H, D], the overwritten queries; None when no sequence has tracked rows.
        k_old: model [R, Hkv, D], the overwritten keys; None likewise.
        rows: int32 [R].
        segments: int32 [S, 5].
        key_range: int32 [S, 2].
        scale: factor of the scores, usually 1 / sqrt(D).
        max_tracked: the most tracked rows; sizes the work on a GPU.
        out: out, model [R, H, D], as `window_attention` gives it.
        lse: out, float32 [R, H], likewise.
        mass: out, float32 [S, C]; 0 outside of the key range.
        similarity: out, float64 [S].

    Raises:
        ValueError: a wrong argument.

    Source: the paper's drift test and most-attended token, as its code computes them.
    """
    _drift_attention(
        q_cache, k_cache, v_cache, q_old, k_old, rows, segments, key_range, scale,
        max_tracked, out, lse, mass, similarity,
    )  # fmt: skip


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


def add_rms_norm(
    residual: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    rows: Tensor | None,
    x_cache: Tensor | None,
) -> None:
    """Add `delta` to the residual, store the sum in the layer-input cache, normalise it.

    The sum is rounded to the model dtype; the norm is float32, rounded, then times the weight.

    Args:
        residual: in and out, model [R, d].
        delta: model [R, d], or None.
        weight: model [d].
        eps: added to the mean square.
        out: out, model [R, d].
        rows: int32 [R], given together with `x_cache`, or None.
        x_cache: in and out, model [N, d], or None.

    Raises:
        ValueError: a wrong argument.

    Source: RMSNorm (arXiv 1910.07467) in the rounding order of LLaDA's code.
    """
    _add_rms_norm(residual, delta, weight, eps, out, rows, x_cache)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight + bias, for the few rows of a step.

    On the CPU a row does not depend on the others. On a GPU this is the vendor's product, whose
    sums may be in another order for another number of rows.

    Args:
        x: model [R, K], rows may be any distance apart.
        weight: model [K, N], the transposed projection; rows may be any distance apart, and on a
            GPU columns may be contiguous instead.
        bias: model [N], or None.
        out: out, model [R, N].

    Raises:
        ValueError: a wrong argument.

    Source: torch.nn.functional.linear.
    """
    _linear(x, weight, bias, out)


def swiglu(gate_up: Tensor, out: Tensor) -> None:
    """out = silu(gate) * up, silu in float32 and rounded to the model dtype before the product.

    Args:
        gate_up: model [R, 2F], gate, then up.
        out: out, model [R, F].

    Raises:
        ValueError: a wrong argument.

    Source: "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    _swiglu(gate_up, out)


def project_qkv(
    residual: Tensor,
    delta: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    rope: Tensor,
    capacity: int,
    x_cache: Tensor | None,
    q_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_old: Tensor | None,
    k_old: Tensor | None,
    hidden: Tensor,
    qkv: Tensor,
) -> None:
    """Recompute q, k, v of a layer's rows: the bits of `add_rms_norm`, `linear`, `cache_write`.

    Args:
        residual: in and out, model [R, d]; `delta` is added to it.
        delta: model [R, d], or None.
        norm_weight: model [d].
        eps: as in `add_rms_norm`.
        weight: model [d, (H + 2 Hkv) * D], laid out as for `linear`.
        bias: model [(H + 2 Hkv) * D], or None.
        rows: int32 [R].
        rope: float32 [at least C, D], as `cache_write` takes it.
        capacity: C; position = slot % C.
        x_cache: in and out, model [N, d], gets the new residual of the rows; or None.
        q_cache: in and out, model [N, H, D].
        k_cache: in and out, model [N, Hkv, D].
        v_cache: in and out, model [N, Hkv, D].
        q_old: out, model [R, H, D], the overwritten queries; or None.
        k_old: out, model [R, Hkv, D], the overwritten keys; or None.
        hidden: out, model [R, d], the normalised residual.
        qkv: out, model [R, (H + 2 Hkv) * D], before the rotation.

    Raises:
        ValueError: a wrong argument.

    Source: the paper's depth-selective recomputation, for a row list or all rows of a layer.
    """
    _project_qkv(
        residual, delta, norm_weight, eps, weight, bias, rows, rope, capacity, x_cache, q_cache,
        k_cache, v_cache, q_old, k_old, hidden, qkv,
    )  # fmt: skip


def output_mlp(
    attention: Tensor,
    out_weight: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    hidden: Tensor,
    gate_up: Tensor,
    activation: Tensor,
    delta: Tensor,
) -> None:
    """From attention to the end of a layer: the bits of `linear`, `add_rms_norm`, `linear`,
    `swiglu` and `linear`. F is the width of the feed-forward block.

    Args:
        attention: model [R, H * D].
        out_weight: model [H * D, d]; the three matrices laid out as for `linear`.
        residual: in and out, model [R, d]; gets the projected attention added.
        norm_weight: model [d].
        eps: added to the mean square.
        gate_up_weight: model [d, 2F], gate, then up.
        down_weight: model [F, d].
        hidden: out, model [R, d], the normalised residual.
        gate_up: out, model [R, 2F].
        activation: out, model [R, F].
        delta: out, model [R, d], what the feed-forward block adds; not yet in `residual`.

    Raises:
        ValueError: a wrong argument.

    Source: the second half of a LLaDA block (arXiv 2502.09992).
    """
    _output_mlp(
        attention, out_weight, residual, norm_weight, eps, gate_up_weight, down_weight, hidden,
        gate_up, activation, delta,
    )  # fmt: skip


def token_confidence(
    logits: Tensor, noise: Tensor | None, token: Tensor, confidence: Tensor
) -> None:
    """The token of every row of logits and the model's probability of it.

    token = argmax(logits + noise), ties to the lowest id; confidence = softmax(logits)[token],
    summed in double. A row with NaN or +infinity gets token 0 and confidence NaN, and is never
    committed.

    Args:
        logits: model [W, V]; rows may be any distance apart.
        noise: float64 [W, V], or None for greedy decoding.
        token: out, int64 [W].
        confidence: out, float64 [W].

    Raises:
        ValueError: a wrong argument.

    Source: LLaDA's low-confidence decoding (arXiv 2502.09992).
    """
    _token_confidence(logits, noise, token, confidence)


def commit(
    token: Tensor,
    confidence: Tensor,
    candidates: Tensor,
    rule: Tensor,
    amount: Tensor,
    key_range: Tensor,
    eos_id: int,
    first_full_layer: Tensor | None,
    num_layers: int,
    tokens: Tensor,
    masked: Tensor,
    committed: Tensor,
    eos_position: Tensor,
    status: Tensor,
) -> None:
    """Commit candidates by confidence, cut the tail after the first EOS, report to the host.

    Rules per sequence: 0 threshold (amount eps: confidence >= min(eps, best)), 1 top k (amount
    k), 2 factor (the r-th best while confidence >= 1 - amount / (r + 1), the best always).
    Candidates that are -1 or no longer masked are ignored; a NaN confidence stops the whole
    sequence from committing.

    Args:
        token: int64 [W].
        confidence: float64 [W].
        candidates: int32 [W], slots, -1 = skip.
        rule: int32 [S].
        amount: float64 [S].
        key_range: int32 [S, 2]; positions outside of it are never touched.
        eos_id: token id that ends the answer, -1 = none does.
        first_full_layer: int32 [S]; a sequence below `num_layers` is left as it is, because its
            drift test failed. None: every sequence commits.
        num_layers: of the model.
        tokens: in and out, int64 [S, C].
        masked: in and out, bool [S, C].
        committed: out, bool [S, C], exactly the positions committed by this call.
        eos_position: in and out, int32 [S], -1 before the tail was cut.
        status: out, int32 [S, 4]: positions committed, positions still masked, EOS position,
            candidates whose confidence was NaN.

    Raises:
        ValueError: a wrong argument.

    Source: the paper's code (threshold, top k, EOS); Fast-dLLM (factor).
    """
    _commit(
        token,
        confidence,
        candidates,
        rule,
        amount,
        key_range,
        eos_id,
        first_full_layer,
        num_layers,
        tokens,
        masked,
        committed,
        eos_position,
        status,
    )
