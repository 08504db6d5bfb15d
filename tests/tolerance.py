"""How far an operator may be from the truth: one rule for all of them.

The truth is the reference run in float64 on the same inputs. Plain torch in the operator's dtype
makes an error of its own; an operator may make at most twice the largest of it, plus the format
noise of the result's dtype at each element (the rule of FlashAttention-3's tests). Exact operators
are compared bit by bit instead. Plain torch must be no luckier than the operator may be: where the
order of a long sum is not ours to choose, `opcase.run_plain` sums in the plainest order.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORMAT_SCALE = 0.3
"""Magnitude below which an element's noise no longer shrinks: sums of unit-sized terms cancel."""


def assert_close(
    name: str,
    actual: Tensor,
    truth: Tensor,
    plain: Tensor,
    arithmetic: torch.dtype | None = None,
    condition: float = 1.0,
) -> None:
    """Fail unless |actual - truth| <= 2 max|plain - truth| + eps (condition |truth| + 0.3).

    Args:
        name: what is compared, for the message.
        actual: the operator's result, in its dtype.
        truth: the reference's result in float64. Where it is not finite, `actual` must be the same.
        plain: the result of plain torch in the dtype of the operator.
        arithmetic: dtype whose eps counts, where the result is stored wider than it is computed.
        condition: how many times a relative rounding error of an intermediate value grows on its
            way into the result: |x| for exp(x).
    """
    if actual.shape != truth.shape or plain.shape != truth.shape:
        shapes = [list(t.shape) for t in (actual, truth, plain)]
        raise AssertionError(f"{name}: shapes of result, truth and plain torch differ: {shapes}")
    if truth.numel() == 0:
        return
    exact, result, plain = truth.double(), actual.double(), plain.double()
    is_odd = ~exact.isfinite()
    same = (result == exact) | (result.isnan() & exact.isnan())
    wrong = torch.where(is_odd, ~same, ~result.isfinite())
    if wrong.any():
        where = _first(wrong)
        raise AssertionError(
            f"{name}: got {result[where].item()} at {list(where)} of {list(exact.shape)}, "
            f"truth {exact[where].item()}"
        )
    error = (result - exact).abs().masked_fill(is_odd, 0.0)
    plain_error = (plain - exact).abs().masked_fill(is_odd, 0.0).max()
    eps = torch.finfo(arithmetic or actual.dtype).eps
    noise = eps * (condition * exact.abs() + FORMAT_SCALE)
    excess = (error - 2 * plain_error - noise).masked_fill(is_odd, -1.0)
    if (excess > 0).any():
        where, largest = _first(excess == excess.max()), _first(error == error.max())
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {excess.numel()} elements are too far off, most "
            f"at {list(where)} of {list(exact.shape)}: got {result[where].item():.9g}, truth "
            f"{exact[where].item():.9g}, error {error[where].item():.3g}, allowed 2 x "
            f"{plain_error.item():.3g} + {noise[where].item():.3g}; the largest error of all is "
            f"{error.max().item():.3g} at {list(largest)}"
        )


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Fail unless two tensors have the same dtype, shape and bits (any NaN equals any NaN)."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise AssertionError(
            f"{name}: got {actual.dtype} {list(actual.shape)}, "
            f"expected {expected.dtype} {list(expected.shape)}"
        )
    differs = actual != expected
    if actual.is_floating_point():
        differs |= actual.signbit() != expected.signbit()  # 0.0 == -0.0
        differs &= ~(actual.isnan() & expected.isnan())
    if differs.any():
        where = _first(differs)
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ, the first at "
            f"{list(where)}: got {actual[where].item()}, expected {expected[where].item()}"
        )


def _first(flags: Tensor) -> tuple[int, ...]:
    """Index of the first true element."""
    return tuple(flags.nonzero()[0].tolist())
