"""What the tests of all operators do alike: call an op on copies, compare, and break its arguments.

A case is a dict of argument name -> value in the schema's order. Results are only ever returned as
copies, so one case can be run by the op, by the reference and by the reference in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from elastic_cache import ops, reference
from schemas import SCHEMAS
from tolerance import assert_close, assert_same_bits
from torch import Tensor

Case = dict[str, Any]

TILE_SIZES = (0, 1, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65)
"""Nothing, one, odd, and one less and one more than what a kernel may take at a time."""


def run(function: Any, op: str, case: Case) -> dict[str, Tensor]:
    """Call op of `function` (a module) on copies of its outputs; return the outputs by name."""
    names = [argument.name for argument in SCHEMAS[op]]
    if list(case) != names:
        raise AssertionError(f"{op} takes {names}, the test gives {list(case)}")
    outputs = {
        argument.name: case[argument.name].clone()
        for argument in SCHEMAS[op]
        if argument.is_output and case[argument.name] is not None
    }
    if getattr(function, op)(*{**case, **outputs}.values()) is not None:
        raise AssertionError(f"{op} must return nothing")
    return outputs


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with so many threads inside of an op."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_reference(op: str, case: Case) -> dict[str, Tensor]:
    """The reference's outputs; its many small steps are slower with several threads."""
    with threads(1):
        return run(reference, op, case)


def run_plain(op: str, case: Case) -> dict[str, Tensor]:
    """The reference's outputs in the op's dtype, whose error measures the op's.

    On a GPU the products are the vendor's, who adds the terms of a sum in an order of his choice.
    An order in parts has half the error of one term after the other (48 terms: 3.6e-7 to 4e-7
    against 7.6e-7, and 1.3e-6 if the bias comes first; the largest of 930 elements, mean of 400
    draws), so torch's product, in parts in one call, says nothing of a call that is not. The
    reference's sums are therefore taken in the plainest order here. On the CPU the op has a fixed
    order that is no worse than that of torch's product, and is held against it.
    """
    has_vendor_product = any(isinstance(v, Tensor) and v.is_cuda for v in case.values())
    with pytest.MonkeyPatch.context() as patch:
        if has_vendor_product:
            for module in (reference, reference.layers):  # called by itself, and inside of a layer
                patch.setattr(module, "linear", linear_in_order)
        return run_reference(op, case)


def linear_in_order(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, batch_invariant: bool
) -> None:
    """`reference.linear`, its terms added one after the other to the bias."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    sums = torch.zeros(out.shape, dtype=wide, device=x.device)
    if bias is not None:
        sums += bias.to(wide)
    for k in range(x.shape[1]):
        sums += x[:, k, None].to(wide) * weight[k].to(wide)
    out.copy_(sums)


def widened(case: Case) -> Case:
    """The case with its floating-point tensors in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in case.items()
    }


def check_exact(op: str, case: Case) -> dict[str, Tensor]:
    """The op and the reference give the same bits; returns the op's outputs."""
    result = run(ops, op, case)
    for name, expected in run_reference(op, case).items():
        assert_same_bits(f"{op}: {name}", result[name], expected)
    return result


def check_close(
    op: str,
    case: Case,
    *,
    exact: tuple[str, ...] = (),
    scratch: tuple[str, ...] = (),
    arithmetic: torch.dtype | None = None,
    condition: float = 1.0,
) -> dict[str, Tensor]:
    """Outputs named in `exact` match the reference in every bit, the others by tolerance.py.

    What is left in those named in `scratch` is nobody's business.
    """
    result = run(ops, op, case)
    plain, truth = run_plain(op, case), run_reference(op, widened(case))
    for name, actual in result.items():
        if name in scratch:
            continue
        if name in exact or not actual.is_floating_point():
            assert_same_bits(f"{op}: {name}", actual, plain[name])
        else:
            label = f"{op}: {name}"
            assert_close(label, actual, truth[name], plain[name], arithmetic, condition)
    return result


def check_contract(op: str, case: Case) -> None:
    """Inputs stay as they are; calls repeat in every bit, with any number of threads; opcheck."""
    before = {n: v.clone() for n, v in case.items() if isinstance(v, Tensor)}
    first = run(ops, op, case)
    for name, value in before.items():
        assert_same_bits(f"{op}: input {name} after the call", case[name], value)
    for count in (1, 2, 1, torch.get_num_threads()):
        with threads(count):
            for name, value in run(ops, op, case).items():
                assert_same_bits(f"{op}: {name} with {count} threads", value, first[name])
    copies = {n: v.clone() if isinstance(v, Tensor) else v for n, v in case.items()}
    torch.library.opcheck(getattr(torch.ops.elastic_cache, op).default, tuple(copies.values()))


def assert_rejected(op: str, case: Case, argument: str, rule: str = "") -> None:
    """The op refuses the case in a sentence naming itself and `argument`, and writes nothing."""
    before = {n: v.clone() for n, v in case.items() if isinstance(v, Tensor)}
    with pytest.raises((ValueError, RuntimeError)) as caught:
        getattr(ops, op)(*case.values())
    sentence = str(caught.value).splitlines()[0]
    for part in (f"{op}: ", argument, rule):
        if part not in sentence:
            raise AssertionError(f"{op} with a bad {argument} must say {part!r}, said {sentence!r}")
    for name, value in before.items():
        assert_same_bits(f"{op}: {name} after an error", case[name], value)


def check_rejects_malformed(op: str, case: Case) -> None:
    """Every tensor argument in turn with a wrong dtype, number of dimensions and layout."""
    for argument in SCHEMAS[op]:
        value = case[argument.name]
        if isinstance(value, Tensor):
            for bad, rule in _malformed(value):
                assert_rejected(op, {**case, argument.name: bad}, argument.name, rule)


def _malformed(value: Tensor) -> Iterator[tuple[Tensor, str]]:
    if value.numel() < 2:
        raise AssertionError("tensors of a case to be malformed must have two elements or more")
    is_narrow = value.dtype in (torch.float32, torch.bfloat16, torch.int32)
    wide, narrow = (
        (torch.float64, torch.float32) if value.is_floating_point() else (torch.int64, torch.int32)
    )
    yield value.to(wide if is_narrow else narrow), "must "
    yield value[None], "must be"
    yield torch.stack((value, value), dim=-1)[..., 0], "contiguous"


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output as it may be found: NaN, a number no op writes, or true."""
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    value = float("nan") if dtype.is_floating_point else -77
    return torch.full(shape, value, dtype=dtype, device=device)


def spread_rows(x: Tensor) -> Tensor:
    """The same matrix as a view with NaN before, between and after its rows."""
    rows, width = x.shape
    storage = torch.full((rows + 1, width + 5), float("nan"), dtype=x.dtype, device=x.device)
    view = storage.flatten()[3:].as_strided((rows, width), (width + 5, 1), 3)
    view.copy_(x)
    return view


def normal(rng: torch.Generator, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=rng).to(device, dtype)


def random_slots(
    rng: torch.Generator, count: int, num_slots: int, device: torch.device, skipped: float = 0.2
) -> Tensor:
    """[count] int32 distinct slots in random order, a share of them -1."""
    slots = torch.randperm(num_slots, generator=rng)[:count]
    slots[torch.rand(len(slots), generator=rng) < skipped] = -1
    return slots.to(device, torch.int32)


def can_be_batch_invariant(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of sizes that are multiples of 64 can: see `ops.linear`."""
    if device.type == "cpu":
        return True
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) == (9, 0)


def int32(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
