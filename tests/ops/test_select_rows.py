"""select_rows: tracked, committed, window and lookahead rows of a step, all of it exact."""

from __future__ import annotations

import pytest
import torch
from elastic_cache import ops
from hypothesis import given, settings
from hypothesis import strategies as st
from opcase import (
    TILE_SIZES,
    Case,
    assert_rejected,
    check_contract,
    check_exact,
    check_rejects_malformed,
    int32,
    poisoned,
)

CPU = torch.device("cpu")


def make_case(
    rng: torch.Generator,
    device: torch.device,
    capacity: int,
    num_sequences: int = 2,
    num_layers: int = 3,
    track_num: int = 2,
    window: int = 16,
    lookahead: int = 4,
) -> Case:
    """Disjoint masked and committed positions; tracked ones repeat and hit committed ones."""
    kind = torch.rand(num_sequences, capacity, generator=rng)
    masked, committed = kind < 0.5, kind > 0.8
    tracked = torch.full((num_layers, num_sequences, track_num), -1, dtype=torch.int32)
    for s in range(num_sequences):
        free = (~masked[s]).nonzero().flatten().int()
        if len(free):
            chosen = torch.randint(len(free), (num_layers, track_num), generator=rng)
            tracked[:, s] = free[chosen]
    tracked[torch.rand(tracked.shape, generator=rng) < 0.2] = -1
    max_rows = num_sequences * capacity + 5
    return {
        "masked": masked.to(device),
        "committed": committed.to(device),
        "tracked": tracked.to(device),
        "window": int32([window + s for s in range(num_sequences)], device),
        "lookahead": int32([lookahead + s for s in range(num_sequences)], device),
        "rows": poisoned(max_rows, dtype=torch.int32, device=device),
        "segments": poisoned(num_sequences, 5, dtype=torch.int32, device=device),
        "window_rows": poisoned(max_rows, dtype=torch.int32, device=device),
    }


def test_example(device: torch.device) -> None:
    """Two sequences of 8 positions, worked out by hand."""
    masked, committed = (
        torch.tensor([[c != "_" for c in sequence] for sequence in flags], device=device)
        for flags in (["___mm_mm", "mmmmmmmm"], ["_c___c__", "________"])
    )
    tracked = int32([[[5, 0], [-1, -1]], [[2, 0], [-1, -1]]], device)
    window, lookahead = int32([2, 3], device), int32([1, 0], device)
    rows, window_rows = (poisoned(n, dtype=torch.int32, device=device) for n in (14, 8))
    segments = poisoned(2, 5, dtype=torch.int32, device=device)
    ops.select_rows(masked, committed, tracked, window, lookahead, rows, segments, window_rows)
    # Position 5 of sequence 0 was committed and tracked: it is listed once, as tracked.
    assert rows.tolist() == [0, 2, 5, 1, 3, 4, 6, 8, 9, 10, -1, -1, -1, -1]
    assert segments.tolist() == [[0, 3, 1, 2, 1], [7, 0, 0, 3, 0]]
    assert window_rows.tolist() == [4, 5, 7, 8, 9, -1, -1, -1]


@pytest.mark.parametrize("reason", ["nothing is masked", "the window is 0"])
def test_a_finished_sequence_has_no_rows(
    device: torch.device, rng: torch.Generator, reason: str
) -> None:
    """Though something was committed and tracked; the rows of the next one follow at once."""
    case = make_case(rng, device, 70, num_sequences=3)
    if reason == "nothing is masked":
        case["masked"][1] = False
    else:
        case["window"][1] = 0
    result = check_exact("select_rows", case)
    end = int(result["segments"][0].sum())
    assert case["committed"][1].any() and (case["tracked"][:, 1] >= 0).any()
    assert result["segments"][1].tolist() == [end, 0, 0, 0, 0]
    assert result["segments"][2, 0] == end < int(result["segments"][2].sum())


@pytest.mark.parametrize("capacity", [*TILE_SIZES, 1040, 2047, 4096, 4100])
def test_sizes(device: torch.device, rng: torch.Generator, capacity: int) -> None:
    check_exact("select_rows", make_case(rng, device, capacity))


@pytest.mark.parametrize("window", TILE_SIZES)
def test_windows(device: torch.device, rng: torch.Generator, window: int) -> None:
    check_exact("select_rows", make_case(rng, device, 100, window=window, lookahead=window // 2))


@pytest.mark.parametrize(
    "shape",
    [
        {"num_sequences": 0},
        {"num_sequences": 7},
        {"num_layers": 0},
        {"num_layers": 3000, "track_num": 1},
        {"track_num": 0},
        {"track_num": 600},
    ],
    ids=str,
)
def test_shapes(device: torch.device, rng: torch.Generator, shape: dict[str, int]) -> None:
    check_exact("select_rows", make_case(rng, device, 33, **shape))


@pytest.mark.parametrize("capacity", [48, 100])
@pytest.mark.parametrize("num_sequences", [31, 32, 33, 70])
def test_many_sequences(
    device: torch.device, rng: torch.Generator, num_sequences: int, capacity: int
) -> None:
    """A GPU takes 32 at a time."""
    check_exact("select_rows", make_case(rng, device, capacity, num_sequences))


@pytest.mark.parametrize("capacity", [20_000, 150_000])
def test_long_sequences(device: torch.device, rng: torch.Generator, capacity: int) -> None:
    """A GPU's shared memory holds a few of the one at a time, and one of the other."""
    check_exact("select_rows", make_case(rng, device, capacity, num_sequences=12, track_num=50))


@pytest.mark.parametrize("name", ["masked", "committed"])
def test_flags_that_begin_anywhere(device: torch.device, rng: torch.Generator, name: str) -> None:
    case = make_case(rng, device, 64)
    flags = torch.zeros(case[name].numel() + 1, dtype=torch.bool, device=device)
    case[name] = flags[1:].view_as(case[name]).copy_(case[name])
    check_exact("select_rows", case)


def test_exactly_full_row_lists(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, 65)
    result = check_exact("select_rows", case)
    for name in ("rows", "window_rows"):
        case[name] = case[name][: int((result[name] >= 0).sum())].clone()
    check_exact("select_rows", case)


def test_contract(device: torch.device, rng: torch.Generator) -> None:
    check_contract("select_rows", make_case(rng, device, 1000, num_sequences=4))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_of_any_state(data: st.DataObject) -> None:
    """The rows are those of the reference, distinct, and every kind is where segments say."""
    capacity = data.draw(st.integers(1, 20), "capacity")
    kinds = data.draw(st.lists(st.sampled_from("mcx"), min_size=capacity, max_size=capacity))
    free = [p for p, kind in enumerate(kinds) if kind != "m"]
    chosen = data.draw(st.lists(st.sampled_from([-1, *free]), max_size=6), "tracked")
    case: Case = {
        "masked": torch.tensor([[kind == "m" for kind in kinds]]),
        "committed": torch.tensor([[kind == "c" for kind in kinds]]),
        "tracked": int32(chosen, CPU).view(len(chosen), 1, 1),
        "window": int32([data.draw(st.integers(0, 24), "window")], CPU),
        "lookahead": int32([data.draw(st.integers(0, 24), "lookahead")], CPU),
        "rows": poisoned(capacity, dtype=torch.int32, device=CPU),
        "segments": poisoned(1, 5, dtype=torch.int32, device=CPU),
        "window_rows": poisoned(capacity, dtype=torch.int32, device=CPU),
    }
    result = check_exact("select_rows", case)
    begin, tracked, committed, window, lookahead = result["segments"][0].tolist()
    rows = [r for r in result["rows"].tolist() if r >= 0]
    masks = [p for p, kind in enumerate(kinds) if kind == "m"]
    if not masks or not int(case["window"]):
        assert not rows and not any(result["segments"][0].tolist())
        return
    assert begin == 0 and len(rows) == len(set(rows)) == tracked + committed + window + lookahead
    assert rows[:tracked] == sorted({p for p in chosen if p >= 0})
    assert {p for p, kind in enumerate(kinds) if kind == "c"} <= set(rows[: tracked + committed])
    assert rows[tracked + committed :] == masks[: window + lookahead]
    assert window == min(int(case["window"]), len(masks))


def test_rejects(device: torch.device, rng: torch.Generator) -> None:
    case = make_case(rng, device, 40)
    check_rejects_malformed("select_rows", case)
    for name, bad in {
        "committed": case["committed"][:, 1:].contiguous(),
        "tracked": case["tracked"][:, 1:].contiguous(),
        "window": case["window"][1:],
        "lookahead": case["lookahead"][1:],
        "segments": case["segments"][:, 1:].contiguous(),
    }.items():
        assert_rejected("select_rows", {**case, name: bad}, name, "must be [")


def test_row_lists_too_short(rng: torch.Generator) -> None:
    """A GPU does not look at what it selected before the host does; the CPU refuses at once."""
    case = make_case(rng, CPU, 40)
    for name, bad in (("rows", case["rows"][:10]), ("window_rows", case["window_rows"][:10])):
        with pytest.raises((ValueError, RuntimeError), match=f"select_rows: .*{name}.*10"):
            ops.select_rows(*{**case, name: bad.clone()}.values())


def test_rejects_tracked_outside(rng: torch.Generator) -> None:
    case = make_case(rng, CPU, 40)
    case["tracked"][0, 0, 0] = 40
    assert_rejected("select_rows", case, "tracked", "40")
