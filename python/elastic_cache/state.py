"""The tokens of the sequences being decoded, what is known about each position, and row lists.

Everything lives on the device at fixed addresses, so that ops decide without asking the host and a
captured step finds its data. Only the commit changes `tokens`, `masked`, `committed` and
`eos_position`; only the drift decision lowers `first_full_layer`; only it, or the choice of the
most due rows in its place, changes `tracked`; only that choice, and a full pass, which leaves
nothing due, changes `due`; only the row selection changes the lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from elastic_cache.report import NUM_SEGMENTS, Report


@dataclass(frozen=True)
class DecodeState:
    """S sequences of C positions; L layers; k tracked tokens per layer.

    `tracked` are lists of positions to be computed in the next step: first one for every layer
    that the drift test chose (none if no sequence is tested), then those that hold `chosen`.
    """

    tokens: torch.Tensor  # int64 [S, C]
    masked: torch.Tensor  # bool [S, C] still to be decoded; a state of its own, not token == mask
    committed: torch.Tensor  # bool [S, C] committed in the previous step
    key_range: torch.Tensor  # int32 [S, 2] first and one-past-last position
    eos_position: torch.Tensor  # int32 [S] the EOS that cut the tail, -1 before that
    tracked: torch.Tensor  # int32 [lists, S, k] positions chosen in the previous step, -1 = none
    chosen: torch.Tensor  # int32 [S, m] those chosen as most due; of policy rolling alone
    similarity: torch.Tensor  # float64 [L, S] what the drift test of the last step found
    due: torch.Tensor  # int32 [S, C] how due a position is to be computed; of policy rolling alone
    first_full_layer: torch.Tensor  # int32 [S] L until a drift test fails
    status: torch.Tensor  # int32 [S, 4] what the last commit reports

    @classmethod
    def allocate(cls, report: Report, capacity: int, num_tracking: int) -> DecodeState:
        """Room for sequences of up to `capacity` positions; part of it lives in the report.

        `num_tracking`: lists of the drift test; the others are of `chosen`.
        """
        device, count = report.status.device, len(report.status)
        due = report.tracked[num_tracking:]
        # Of a single sequence the lists are one after another in memory already.
        chosen = due.view(1, -1) if count == 1 else due.new_zeros(count, due[:, 0].numel())
        return cls(
            tokens=torch.zeros(count, capacity, dtype=torch.int64, device=device),
            masked=torch.zeros(count, capacity, dtype=torch.bool, device=device),
            committed=torch.zeros(count, capacity, dtype=torch.bool, device=device),
            key_range=torch.zeros(count, 2, dtype=torch.int32, device=device),
            eos_position=torch.zeros(count, dtype=torch.int32, device=device),
            tracked=report.tracked,
            chosen=chosen,
            similarity=report.similarity,
            due=torch.zeros(count, capacity, dtype=torch.int32, device=device),
            first_full_layer=report.first_full_layer,
            status=report.status,
        )

    def start(self, sequence: int, ids: torch.Tensor, masked: torch.Tensor) -> None:
        """The state before step 0 of a sequence; ids int64 [T] and masked bool [T].

        Enqueued like all else: the steps of others may be under way.
        """
        self.stop(sequence)
        length = len(ids)
        self.tokens[sequence].zero_()[:length].copy_(self._sent(ids), non_blocking=True)
        self.masked[sequence, :length].copy_(self._sent(masked), non_blocking=True)
        self.due[sequence].zero_()
        self.key_range[sequence, 0].fill_(0)
        self.key_range[sequence, 1].fill_(length)
        self.eos_position[sequence].fill_(-1)
        self.status[sequence].zero_()

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        """Where a copy to the device need not wait for it: in pinned memory, if it is a GPU."""
        return values.pin_memory() if self.tokens.is_cuda else values

    def stop(self, sequence: int) -> None:
        """A sequence that has nothing to compute."""
        self.masked[sequence].fill_(False)
        self.committed[sequence].fill_(False)
        self.tracked[:, sequence].fill_(-1)
        self.chosen[sequence].fill_(-1)


@dataclass(frozen=True)
class RowLists:
    """The rows of a step; N slots, W candidates at most. Lists are padded with -1."""

    rows: torch.Tensor  # int32 [N] slots computed in the layers that reuse the cache
    segments: torch.Tensor  # int32 [S, 5] kinds of `rows`
    window_rows: torch.Tensor  # int32 [W] where the candidates stand in `rows`
    candidates: torch.Tensor  # int32 [W] the candidates' slots, ascending
    window: torch.Tensor  # int32 [S] masked positions decoded per step; 0: has no rows
    lookahead: torch.Tensor  # int32 [S] further masked positions computed, not decoded
    num_rows: torch.Tensor  # int32 [S] rows of a step in all, of policy rolling alone

    @classmethod
    def allocate(cls, report: Report, num_slots: int, num_candidates: int) -> RowLists:
        device, count = report.status.device, len(report.status)

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            rows=int32(num_slots),
            segments=report.segments,
            window_rows=int32(num_candidates),
            candidates=report.candidates[:num_candidates],
            window=int32(count),
            lookahead=int32(count),
            num_rows=int32(count),
        )


@dataclass(frozen=True)
class FullLists:
    """Candidates of a full pass, which is one sequence's: what `ops.select_rows` takes for that,
    row s of a matrix if it is sequence s, and gives."""

    window: torch.Tensor  # int32 [S, S] masked positions that s decodes, 0 for the others
    verdict: torch.Tensor  # int32 [S, S] L for s, 0 for the others, which `ops.commit` leaves alone
    lookahead: torch.Tensor  # int32 [S] zeros
    committed: torch.Tensor  # bool [S, C] none
    tracked: torch.Tensor  # int32 [1, S, 1] none
    rows: torch.Tensor  # int32 [W] slots of the candidates
    segments: torch.Tensor  # int32 [S, 5] kinds of `rows`
    window_rows: torch.Tensor  # int32 [W]

    @classmethod
    def allocate(cls, state: DecodeState, num_candidates: int, depth: int) -> FullLists:
        """Room for `num_candidates` candidates; of a model of `depth` layers."""
        count, device = len(state.tokens), state.tokens.device
        kind: dict[str, Any] = {"dtype": torch.int32, "device": device}
        return cls(
            window=torch.zeros(count, count, **kind),
            verdict=torch.eye(count, **kind) * depth,
            lookahead=torch.zeros(count, **kind),
            committed=torch.zeros_like(state.committed),
            tracked=torch.full((1, count, 1), -1, **kind),
            rows=torch.zeros(num_candidates, **kind),
            segments=torch.zeros(count, NUM_SEGMENTS, **kind),
            window_rows=torch.zeros(num_candidates, **kind),
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
        gamma: float64 [S], a mean cosine below it sends a sequence to full mode.
        mass: float32 [L, S, C].
        similarity: float64 [L, S].
        tracked: int32 [L, S, k].
    """

    def __init__(
        self,
        gamma: torch.Tensor,
        mass: torch.Tensor,
        similarity: torch.Tensor,
        tracked: torch.Tensor,
    ) -> None:
        self.gamma, self.mass, self.similarity, self.tracked = gamma, mass, similarity, tracked
        self.layers = tuple(
            LayerDrift(
                mass[index],
                similarity[index],
                mass[index : index + 1],
                similarity[index : index + 1],
                tracked[index : index + 1],
            )
            for index in range(len(mass))
        )

    @classmethod
    def allocate(cls, state: DecodeState) -> DriftTest:
        """For all sequences of a state, whose `tracked` begins with a list per layer."""
        depth, shape, device = len(state.similarity), state.tokens.shape, state.tokens.device
        return cls(
            torch.zeros(shape[0], dtype=torch.float64, device=device),
            torch.zeros(depth, *shape, dtype=torch.float32, device=device),
            state.similarity,
            state.tracked[:depth],
        )

    def aside(self) -> DriftTest:
        """With results of its own, so that those of other sequences stay; for a full pass."""
        similarity, tracked = torch.empty_like(self.similarity), torch.empty_like(self.tracked)
        return DriftTest(self.gamma, self.mass, similarity, tracked)
