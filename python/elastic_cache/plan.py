"""What one step computes, as data: row lists on the device and the buffers of the drift test."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DriftTest:
    """Buffers of the drift test and the tracked-token choice; S sequences, C positions."""

    gamma: torch.Tensor  # float64 [S]
    first_full_layer: torch.Tensor  # int32 [S] L until a layer fails, then that layer + 1
    tracked: tuple[torch.Tensor, ...]  # L of int32 [S, k] out: the choice of every layer
    masked: torch.Tensor  # bool [S, C] positions that may not be chosen
    row_segments: torch.Tensor  # int32 [S, 5] kinds of the plan's rows (reuse layers)
    window_segments: torch.Tensor  # int32 [S, 5] kinds of the candidates alone (full layers)
    mass: torch.Tensor  # float32 [S, C] scratch
    similarity: torch.Tensor  # float64 [S] scratch


@dataclass(frozen=True)
class Plan:
    """What one step computes.

    Attributes:
        is_full: every layer computes every position.
        rows: int32 [R] slots computed in the layers that reuse the cache.
        candidates: int32 [W] slots whose logits are decoded, ascending.
        candidate_rows: int64 [W] where the candidates stand in `rows` (in `is_full` steps and
            refreshed layers a candidate's row is its slot).
        drift: the drift test to run in every layer, or None.
        num_commits: commit exactly this many candidates instead of the request's rule.
    """

    is_full: bool
    rows: torch.Tensor
    candidates: torch.Tensor
    candidate_rows: torch.Tensor
    drift: DriftTest | None = None
    num_commits: int | None = None
