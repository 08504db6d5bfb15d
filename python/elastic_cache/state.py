"""The tokens of the sequences being decoded, what is known about each position, and row lists.

Everything lives on the device at fixed addresses, so that ops decide without asking the host and a
captured step finds its data. Only the commit changes `tokens`, `masked`, `committed` and
`eos_position`; only the drift decision lowers `first_full_layer`; only it, or the choice of the
most due rows in its place, changes `tracked`; only that choice, and a full pass, which leaves
nothing due, changes `due`; only the row selection changes the lists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from elastic_cache.report import NUM_SEGMENTS, Report


@dataclass(frozen=True)
class DecodeState:
    """S sequences of C positions; L layers; k tracked tokens per layer.

    Policy `rolling` tracks nothing: its `tracked` is one list [1, S, k] for all layers, of the
    positions to be computed anew.
    """

    tokens: torch.Tensor  # int64 [S, C]
    masked: torch.Tensor  # bool [S, C] still to be decoded; a state of its own, not token == mask
    committed: torch.Tensor  # bool [S, C] committed in the previous step
    key_range: torch.Tensor  # int32 [S, 2] first and one-past-last position
    eos_position: torch.Tensor  # int32 [S] the EOS that cut the tail, -1 before that
    tracked: torch.Tensor  # int32 [L, S, k] positions chosen in the previous step, -1 = none
    similarity: torch.Tensor  # float64 [L, S] what the drift test of the last step found
    due: torch.Tensor  # int32 [S, C] how due a position is to be computed; of policy rolling alone
    first_full_layer: torch.Tensor  # int32 [S] L until a drift test fails
    status: torch.Tensor  # int32 [S, 4] what the last commit reports

    @classmethod
    def allocate(cls, report: Report, capacity: int) -> DecodeState:
        """Room for sequences of up to `capacity` positions; part of it lives in the report."""
        device, count = report.status.device, len(report.status)
        return cls(
            tokens=torch.zeros(count, capacity, dtype=torch.int64, device=device),
            masked=torch.zeros(count, capacity, dtype=torch.bool, device=device),
            committed=torch.zeros(count, capacity, dtype=torch.bool, device=device),
            key_range=torch.zeros(count, 2, dtype=torch.int32, device=device),
            eos_position=torch.zeros(count, dtype=torch.int32, device=device),
            tracked=report.tracked,
            similarity=report.similarity,
            due=torch.zeros(count, capacity, dtype=torch.int32, device=device),
            first_full_layer=report.first_full_layer,
            status=report.status,
        )

    def start(self, ids: torch.Tensor, masked: torch.Tensor) -> None:
        """The state before step 0 of one sequence; ids int64 [T] and masked bool [T]."""
        length = len(ids)
        self.tokens.zero_()[0, :length] = ids.to(self.tokens.device)
        self.masked.zero_()[0, :length] = masked.to(self.masked.device)
        self.committed.zero_()
        self.due.zero_()
        self.key_range.copy_(torch.tensor([[0, length]], dtype=torch.int32))
        self.eos_position.fill_(-1)
        self.tracked.fill_(-1)
        self.status.zero_()


@dataclass(frozen=True)
class RowLists:
    """The rows of a step; N slots, W candidates at most. Lists are padded with -1."""

    rows: torch.Tensor  # int32 [N] slots computed in the layers that reuse the cache
    segments: torch.Tensor  # int32 [S, 5] kinds of `rows`
    window_rows: torch.Tensor  # int32 [W] where the candidates stand in `rows`
    candidates: torch.Tensor  # int32 [W] the candidates' slots, ascending
    window_segments: torch.Tensor  # int32 [S, 5] kinds of `candidates` as a row list of its own
    window: torch.Tensor  # int32 [S] masked positions decoded per step
    lookahead: torch.Tensor  # int32 [S] further masked positions computed, not decoded
    num_rows: torch.Tensor  # int32 [S] rows of a step in all, of policy rolling alone

    @classmethod
    def allocate(cls, report: Report, num_slots: int) -> RowLists:
        device, count = report.status.device, len(report.status)

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            rows=int32(num_slots),
            segments=report.segments,
            window_rows=int32(len(report.candidates)),
            candidates=report.candidates,
            window_segments=int32(count, NUM_SEGMENTS),
            window=int32(count),
            lookahead=int32(count),
            num_rows=int32(count),
        )


@dataclass(frozen=True)
class LayerDrift:
    """Views of one layer's part of a DriftTest; the last three as of a range of one layer."""

    mass: torch.Tensor  # float32 [S, C]
    similarity: torch.Tensor  # float64 [S]
    masses: torch.Tensor  # float32 [1, S, C]
    similarities: torch.Tensor  # float64 [1, S]
    tracked: torch.Tensor  # int32 [1, S, k]


class DriftTest:
    """Buffers of the drift test and the tracked-token choice of every layer.

    Args:
        state: of the sequences tested; L, S, C and the device are taken from it.
    """

    def __init__(self, state: DecodeState) -> None:
        depth, shape, device = len(state.tracked), state.tokens.shape, state.tokens.device
        self.gamma = torch.zeros(shape[0], dtype=torch.float64, device=device)
        self.mass = torch.zeros(depth, *shape, dtype=torch.float32, device=device)
        self.similarity = state.similarity
        self.layers = tuple(
            LayerDrift(
                self.mass[index],
                self.similarity[index],
                self.mass[index : index + 1],
                self.similarity[index : index + 1],
                state.tracked[index : index + 1],
            )
            for index in range(depth)
        )
