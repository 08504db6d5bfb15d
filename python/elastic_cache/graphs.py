"""Pieces of work as CUDA graphs: what is captured, when, and what is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


def capture_stream(device: torch.device, capture: bool) -> torch.cuda.Stream | None:
    """Where runners capture their steps, if they are to and can.

    One for all runners of an engine: the vendor's products keep a workspace for every stream.
    """
    return torch.cuda.Stream(device) if capture and device.type == "cuda" else None


class Graphs:
    """Pieces of work as CUDA graphs, by key, in one memory pool.

    The first run of a piece is as it is, which loads its kernels; the second is captured.

    Args:
        stream: where they are captured; None: every run is as it is.
        most: so many keys are kept, those run last; None: all.
    """

    def __init__(self, stream: torch.cuda.Stream | None, most: int | None = None) -> None:
        self._stream = stream
        self._most = most
        # The key run last is the last.
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}

    def run(self, key: Hashable, function: Callable[[], None]) -> None:
        """Does what `function` does, which must be the same for the same key."""
        if self._stream is None:
            function()
            return
        is_new = key not in self._graphs
        graph = self._graphs.pop(key, None)
        if is_new:
            function()
        else:
            graph = graph or self._capture(function, self._stream)
            graph.replay()
        self._graphs[key] = graph
        if self._most is not None and len(self._graphs) > self._most:
            del self._graphs[next(iter(self._graphs))]

    def _capture(
        self, function: Callable[[], None], stream: torch.cuda.Stream
    ) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph, which empties torch's cache of memory and collects garbage.
        graph = torch.cuda.CUDAGraph()
        if not any(self._graphs.values()):
            # Torch gives a pool up with its last graph, and cannot capture into it again.
            self._pool = torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        return graph
