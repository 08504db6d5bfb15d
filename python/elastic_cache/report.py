"""What the host learns of a step: one block of memory, read back in one copy.

The fields are views of a block where the operators run; a step ends with one copy of it to host
memory, pinned for a GPU, and the host waits for that once. There are two such copies, so that a
step may be over before the host has read what the one before has found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

NUM_STATUS = 4
STATUS_COMMITTED, STATUS_MASKED, STATUS_EOS_POSITION, STATUS_NOT_FINITE = range(NUM_STATUS)
NUM_SEGMENTS = 5
SEGMENT_WINDOW = 3


@dataclass(frozen=True)
class Report:
    """S sequences, L layers, W candidates at most, k tracked positions in each of some lists."""

    confidence: torch.Tensor  # float64 [W] of the candidates decoded in this step
    similarity: torch.Tensor  # float64 [L, S] mean cosine of the drift test of every layer
    token: torch.Tensor  # int64 [W] likewise
    first_full_layer: torch.Tensor  # int32 [S] first layer the drift test sent to full mode, or L
    status: torch.Tensor  # int32 [S, 4] what the commit reports
    segments: torch.Tensor  # int32 [S, 5] kinds of the rows listed for the next step
    candidates: torch.Tensor  # int32 [W] slots to decode in the next step, padded with -1
    tracked: torch.Tensor  # int32 [lists, S, k] positions chosen in this step, -1 = none
    is_committed: torch.Tensor  # bool [W] which candidates of this step became text


class ReportBlock:
    """The memory behind a report.

    Args:
        device: where the operators run.
        num_sequences, num_layers, num_candidates: S, L, W.
        tracked_lists, track_num: lists of tracked positions, and the k of each.
    """

    def __init__(
        self,
        device: torch.device,
        num_sequences: int,
        num_layers: int,
        num_candidates: int,
        tracked_lists: int,
        track_num: int,
    ) -> None:
        s, w = num_sequences, num_candidates
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "confidence": (torch.float64, (w,)),
            "similarity": (torch.float64, (num_layers, s)),
            "token": (torch.int64, (w,)),
            "first_full_layer": (torch.int32, (s,)),
            "status": (torch.int32, (s, NUM_STATUS)),
            "segments": (torch.int32, (s, NUM_SEGMENTS)),
            "candidates": (torch.int32, (w,)),
            "tracked": (torch.int32, (tracked_lists, s, track_num)),
            "is_committed": (torch.bool, (w,)),
        }
        assert list(self._layout) == [field.name for field in fields(Report)]
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in self._layout.values())
        self._block = torch.zeros(size, dtype=torch.uint8, device=device)
        self._is_remote = device.type != "cpu"
        self._copies = [
            torch.zeros(size, dtype=torch.uint8, pin_memory=self._is_remote) for _ in range(2)
        ]
        self._copied = [torch.cuda.Event() for _ in range(2)] if self._is_remote else []
        self._latest = 0
        self.device = self._views(self._block)

    def copy(self) -> int:
        """Enqueues a copy to the host, in the place of the last but one; which, for `read`."""
        self._latest = which = 1 - self._latest
        self._copies[which].copy_(self._block, non_blocking=True)
        if self._is_remote:
            self._copied[which].record()
        return which

    def wait(self, which: int) -> None:
        """Waits until a copy is there."""
        if self._is_remote:
            self._copied[which].synchronize()

    def read(self, which: int) -> Report:
        """Waits; the report as it was copied then, in memory of its own."""
        self.wait(which)
        return self._views(self._copies[which].clone())

    def _views(self, block: torch.Tensor) -> Report:
        views, start = [], 0
        for dtype, shape in self._layout.values():
            end = start + math.prod(shape) * dtype.itemsize
            views.append(block[start:end].view(dtype).view(shape))
            start = end
        return Report(*views)
