"""Training steps as CUDA graphs, one per shape of a batch.

A step of 32 small layers launches some thousand kernels; launched one by one they take 125 ms of
an H200's host, replayed as a graph only as long as they compute. The first batch of a shape runs
eagerly (it compiles and allocates), the second is captured. The subtle thing: capturing runs
nothing, so the captured step is replayed at once, and its row list is padded with rows of weight
0, so that few shapes differ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from batches import Batch

_ROWS_STEP = 8192


class CapturedStep:
    """Calls `step` (batch on the device -> loss) by replaying graphs of it.

    Everything, eager steps too, must run on one stream other than the default one.
    """

    def __init__(self, step: Callable[[Batch], torch.Tensor], device: torch.device) -> None:
        self._step, self._device = step, device
        self._pool = torch.cuda.graph_pool_handle()
        self._seen: set[tuple[int, ...]] = set()
        self._graphs: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]] = {}

    def __call__(self, batch: Batch) -> torch.Tensor:
        num_rows = -(-len(batch.rows) // _ROWS_STEP) * _ROWS_STEP
        shape = (*batch.ids.shape, num_rows)
        if shape not in self._seen:
            self._seen.add(shape)
            return self._step(Batch(*(t.to(self._device) for t in batch)))
        if shape not in self._graphs:
            self._graphs[shape] = self._capture(batch, num_rows)
        graph, static, loss = self._graphs[shape]
        static.ids.copy_(batch.ids, non_blocking=True)
        static.weights.zero_()
        for buffer, values in zip(static[1:], batch[1:], strict=True):
            buffer[: len(values)].copy_(values, non_blocking=True)
        graph.replay()
        return loss

    def _capture(
        self, batch: Batch, num_rows: int
    ) -> tuple[torch.cuda.CUDAGraph, Batch, torch.Tensor]:
        device = self._device
        static = Batch(
            ids=batch.ids.to(device, copy=True),
            rows=torch.arange(num_rows, device=device),  # many equal rows would be summed slowly
            targets=torch.zeros(num_rows, dtype=torch.int64, device=device),
            weights=torch.zeros(num_rows, device=device),
        )
        graph = torch.cuda.CUDAGraph()
        # The loader's thread pins memory meanwhile, which a global capture would forbid.
        with torch.cuda.graph(
            graph, self._pool, torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            loss = self._step(static)
        return graph, static, loss
