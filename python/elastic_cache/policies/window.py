"""Row selection shared by the policies that decode a sliding window of masked positions."""

from __future__ import annotations

import torch

from elastic_cache import ops
from elastic_cache.state import DecodeState

NUM_SEGMENTS = 5
SEGMENT_WINDOW = 3


class WindowSelector:
    """Calls `ops.select_rows` into buffers allocated once.

    Args:
        state: the sequences decoded; sizes and device are taken from it.
        window: masked positions decoded per step.
        lookahead: further masked positions computed but not decoded.
    """

    def __init__(self, state: DecodeState, window: int, lookahead: int) -> None:
        device, slots = state.tokens.device, state.tokens.numel()

        def int32(*shape: int, value: int = 0) -> torch.Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        num_sequences = state.num_sequences
        self.segments = int32(num_sequences, NUM_SEGMENTS)
        self.window_segments = int32(num_sequences, NUM_SEGMENTS)
        self._rows = int32(slots)
        self._window_rows = int32(slots)
        self._window = int32(num_sequences, value=min(window, state.capacity))
        self._lookahead = int32(num_sequences, value=lookahead)

    def select(self, state: DecodeState) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows int32 [R], candidates int32 [W] and the candidates' index in rows, int64 [W]."""
        ops.select_rows(
            state.masked,
            state.committed,
            state.tracked,
            self._window,
            self._lookahead,
            self._rows,
            self.segments,
            self._window_rows,
        )
        counts = self.segments[:, 1:].sum(0).tolist()
        rows = self._rows[: sum(counts)]
        candidate_rows = self._window_rows[: counts[SEGMENT_WINDOW - 1]].long()
        self.window_segments[:, SEGMENT_WINDOW] = self.segments[:, SEGMENT_WINDOW]
        return rows, rows[candidate_rows], candidate_rows
