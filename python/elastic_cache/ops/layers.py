"""What a transformer block does beside attention. What the letters mean: `ops`."""

from __future__ import annotations

from torch import Tensor

from elastic_cache.native import kernel

_add_rms_norm = kernel("add_rms_norm")
_linear = kernel("linear")
_swiglu = kernel("swiglu")
_project_qkv = kernel("project_qkv")
_output_mlp = kernel("output_mlp")


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


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, batch_invariant: bool
) -> None:
    """out = x weight + bias, for the few rows of a step.

    On the CPU a row does not depend on the others. On a GPU this is the vendor's product, whose
    sums may be in another order for another number of rows, unless `batch_invariant` asks for ours.

    Args:
        x: model [R, K], rows may be any distance apart.
        weight: model [K, N], the transposed projection; rows may be any distance apart, and on a
            GPU columns may be contiguous instead.
        bias: model [N], or None.
        out: out, model [R, N].
        batch_invariant: whether every bit of a row's result must be the same whatever rows are
            beside it. On a GPU that takes bfloat16, compute capability 9.0, a weight whose rows are
            contiguous, and K and N that are multiples of 64.

    Raises:
        ValueError: a wrong argument.

    Source: torch.nn.functional.linear; He et al., "Defeating Nondeterminism in LLM Inference"
        (Thinking Machines, 2025) for what batch invariance is good for.
    """
    _linear(x, weight, bias, out, batch_invariant)


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
    segments: Tensor | None,
    x_cache: Tensor | None,
    q_cache: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_old: Tensor | None,
    k_old: Tensor | None,
    hidden: Tensor,
    qkv: Tensor,
    batch_invariant: bool,
) -> None:
    """Recompute q, k, v of a layer's rows: the bits of `add_rms_norm`, `linear`, `cache_write`.

    On a GPU the product may be another one than that of `linear`, and read `weight` before earlier
    work in the stream has ended: it must not be the output of an operator of this library that is
    still pending.

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
        segments: int32 [S, 5] or None, as `cache_write` takes it.
        x_cache: in and out, model [N, d], gets the new residual of the rows; or None.
        q_cache: in and out, model [N, H, D].
        k_cache: in and out, model [N, Hkv, D].
        v_cache: in and out, model [N, Hkv, D].
        q_old: out, model [R, H, D], the overwritten queries; or None.
        k_old: out, model [R, Hkv, D], the overwritten keys; or None.
        hidden: out, model [R, d], the normalised residual.
        qkv: out, model [R, (H + 2 Hkv) * D], before the rotation.
        batch_invariant: as of `linear`.

    Raises:
        ValueError: a wrong argument.

    Source: the paper's depth-selective recomputation, for a row list or all rows of a layer.
    """
    _project_qkv(
        residual, delta, norm_weight, eps, weight, bias, rows, rope, capacity, segments, x_cache,
        q_cache, k_cache, v_cache, q_old, k_old, hidden, qkv, batch_invariant,
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
    batch_invariant: bool,
) -> None:
    """From attention to the end of a layer: the bits of `linear`, `add_rms_norm`, `linear`,
    `swiglu` and `linear`. F is the width of the feed-forward block. On a GPU: as in `project_qkv`.

    Args:
        attention: model [R, H * D].
        out_weight: model [H * D, d]; the three matrices laid out as for `linear`.
        residual: in and out, model [R, d]; gets the projected attention added.
        norm_weight: model [d].
        eps: added to the mean square.
        gate_up_weight: model [d, 2F], gate, then up.
        down_weight: model [F, d].
        hidden: out, model [R, d], the normalised residual.
        gate_up: scratch, model [R, 2F]; what it holds afterwards depends on device and sizes.
        activation: out, model [R, F].
        delta: out, model [R, d], what the feed-forward block adds; not yet in `residual`.
        batch_invariant: as of `linear`.

    Raises:
        ValueError: a wrong argument.

    Source: the second half of a LLaDA block (arXiv 2502.09992).
    """
    _output_mlp(
        attention, out_weight, residual, norm_weight, eps, gate_up_weight, down_weight, hidden,
        gate_up, activation, delta, batch_invariant,
    )  # fmt: skip
