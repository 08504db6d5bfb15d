"""Runs planned steps: buffers of one sequence, its passes through the layers, and what ends a step.

    window pass   the listed rows through the layers that reuse the cache, decode, commit, and the
                  selection of the next rows; on a GPU one captured graph per number of rows
    full pass     the layers from the first failing one on (or all) over every position, then the
                  same end; on a GPU all layers with their end are one graph per length

The subtle thing: on a GPU nobody looks at the drift test's verdict before the window pass is over.
The commit itself refuses where a test has failed, the host learns of it from the report, and only
then launches the full pass. So a step costs one read-back, and a refreshed one two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from elastic_cache import ops
from elastic_cache.buffers import OverwrittenRows, Workspace
from elastic_cache.cache import Cache, CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.decoding import CommitRule, Decoder
from elastic_cache.forward import Forward
from elastic_cache.models.weights import Model
from elastic_cache.plan import Plan, RollingRule
from elastic_cache.report import SEGMENT_WINDOW, Report, ReportBlock
from elastic_cache.state import DecodeState, DriftTest, RowLists

BUCKET = 16
"""On a GPU rows are padded to a multiple of this, which is a product's granularity as well."""
MAX_CAPTURED_ROWS = 128
MAX_CAPTURED_LENGTHS = 4
CAPACITY_STEP = 256
"""On a GPU capacities are multiples of this, so that requests of other lengths find the graphs."""


@dataclass(frozen=True)
class RunnerShape:
    """What must agree for a request to use a runner (and the graphs it has captured)."""

    capacity: int
    needs: CacheNeeds
    num_candidates: int
    track_num: int
    selects_rows: bool
    tests_drift: bool
    rolling: RollingRule | None
    has_noise: bool
    eos_id: int


@dataclass(frozen=True)
class Start:
    """What a request begins with; ids int64 [T] and masked bool [T] on the CPU."""

    ids: torch.Tensor
    masked: torch.Tensor
    window: int
    lookahead: int
    num_rows: int
    settings: GenerationConfig


def capacity_for(length: int, model: Model) -> int:
    """Positions a runner has for a sequence of `length`."""
    if model.device.type == "cpu":
        return length
    rounded = -(-length // CAPACITY_STEP) * CAPACITY_STEP
    return max(length, min(rounded, model.config.max_length))


def capture_stream(device: torch.device, capture: bool) -> torch.cuda.Stream | None:
    """Where runners capture their steps, if they are to and can.

    One for all runners of an engine: the vendor's products keep a workspace for every stream.
    """
    return torch.cuda.Stream(device) if capture and device.type == "cuda" else None


def runner_bytes(model: Model, shape: RunnerShape) -> int:
    """Device memory that a runner's caches and buffers will take."""
    meta = torch.device("meta")
    cache = Cache(model.config, 1, shape.capacity, shape.needs, meta, model.dtype)
    work = Workspace.allocate(model, _max_rows(shape), meta)
    overwritten = OverwrittenRows.allocate(model, _max_deferred(model, shape), meta)
    return cache.num_bytes + work.num_bytes + overwritten.num_bytes


def _max_rows(shape: RunnerShape) -> int:
    return max(shape.capacity, MAX_CAPTURED_ROWS)


def _max_deferred(model: Model, shape: RunnerShape) -> int:
    """Rows of the window passes that test the drift of all layers at once: the captured ones."""
    return MAX_CAPTURED_ROWS if shape.tests_drift and model.device.type != "cpu" else 0


class Runner:
    """Everything one sequence needs to be decoded, at fixed addresses; reusable by later requests.

    Args:
        model: weights and shape.
        shape: sizes and kinds of the step.
        capture_stream: where window passes on a GPU become CUDA graphs; None launches the same
            kernels one by one, with the same results.
    """

    def __init__(
        self, model: Model, shape: RunnerShape, capture_stream: torch.cuda.Stream | None
    ) -> None:
        device, depth = model.device, model.config.num_layers
        self.shape = shape
        self._depth = depth
        self._is_padded = device.type != "cpu"
        tracked_lists = depth if shape.rolling is None else 1
        self._report = ReportBlock(
            device, 1, depth, shape.num_candidates, tracked_lists, shape.track_num
        )
        report = self._report.device
        self._state = DecodeState.allocate(report, shape.capacity)
        self._lists = RowLists.allocate(report, _max_rows(shape))
        self._drift = DriftTest(self._state) if shape.tests_drift else None
        cache = Cache(model.config, 1, shape.capacity, shape.needs, device, model.dtype)
        self._forward = Forward(model, cache, len(self._lists.rows), _max_deferred(model, shape))
        self._decoder = Decoder(model, shape.num_candidates, shape.has_noise)
        self._rule = CommitRule(1, device)
        self._graphs = self._whole_graphs = None
        if capture_stream is not None:
            self._graphs = Graphs(capture_stream)
            self._whole_graphs = Graphs(capture_stream, most=MAX_CAPTURED_LENGTHS)
        self._length = 0
        self._listed: range | None = None
        self._plan: Plan | None = None

    @torch.inference_mode()
    def start(self, start: Start) -> Report:
        """Begins a sequence; the report says how many rows its first step has."""
        self._length, self._listed, self._plan = len(start.ids), None, None
        self._state.start(start.ids, start.masked)
        self._lists.window.fill_(start.window)
        self._lists.lookahead.fill_(start.lookahead)
        self._lists.num_rows.fill_(start.num_rows)
        self._decoder.start(start.settings)
        self._rule.start(start.settings)
        if self._drift is not None:
            self._drift.gamma.fill_(start.settings.gamma)
        self._select_rows()
        self._report.copy()
        return self._report.wait()

    @torch.inference_mode()
    def launch(self, plan: Plan) -> None:
        """Enqueues a step; on the CPU it is done on return, but for a refresh."""
        self._plan = plan
        if plan.listed is not None:
            self._list_rows(plan)
        if plan.num_commits is not None:
            self._rule.fix(plan.num_commits)
        num_candidates = self._num_candidates(plan)
        self._decoder.draw(num_candidates)
        if plan.is_full:
            self._run_full(0, num_candidates)
            return
        num_rows = self._num_rows(plan)
        if num_rows > MAX_CAPTURED_ROWS:
            self._run_window(num_rows, num_candidates)
        else:
            self._run_captured(num_rows, lambda: self._run_window(num_rows, num_candidates))

    @torch.inference_mode()
    def finish(self) -> tuple[int, Report]:
        """Waits for the step, running the layers that its drift test sent to full mode.

        Returns the first layer that ran in full mode (L when none did) and the report.
        """
        assert self._plan is not None, "launch comes first"
        first_full = 0 if self._plan.is_full else self._depth
        report = self._report.wait()
        if self._drift is not None and not self._plan.is_full:
            first_full = self._verdict(report)
            if first_full < self._depth:
                self._run_full(first_full, self._num_candidates(self._plan))
                report = self._report.wait()
        return first_full, report

    def _verdict(self, report: Report) -> int:
        """The first layer to run in full mode, L for none."""
        return int(report.first_full_layer[0])

    def _num_rows(self, plan: Plan) -> int:
        if not self._is_padded or plan.num_rows > MAX_CAPTURED_ROWS:
            return plan.num_rows
        return -(-plan.num_rows // BUCKET) * BUCKET

    def _num_candidates(self, plan: Plan) -> int:
        return self.shape.num_candidates if self._is_padded else plan.num_candidates

    def _run_window(self, num_rows: int, num_candidates: int) -> None:
        lists, state = self._lists, self._state
        state.first_full_layer.fill_(self._depth)
        rows = lists.rows[:num_rows]
        if self._forward.run_rows(rows, lists.segments, state, self._drift):
            self._end_step(lists.window_rows[:num_candidates], has_verdict=self._drift is not None)

    def _run_full(self, first: int, num_candidates: int) -> None:
        """Layers `first` .. L - 1 over every position, and the end of the step."""
        candidates = self._lists.candidates[:num_candidates]
        if first == 0 and self._whole_graphs is not None:

            def run() -> None:
                self._run_layers(0, candidates)
                self._end_step(candidates, has_verdict=False)

            self._whole_graphs.run(self._length, run)
            return
        self._run_layers(first, candidates)
        self._run_captured(0, lambda: self._end_step(candidates, has_verdict=False))

    def _run_layers(self, first: int, candidates: torch.Tensor) -> None:
        if self.shape.rolling is not None:
            self._state.due.zero_()
        segments = self._lists.window_segments
        self._forward.run_full(first, self._length, candidates, segments, self._state, self._drift)

    def _run_captured(self, key: int, function: Callable[[], None]) -> None:
        """Window passes by their number of rows; 0 is the end of a full pass that began behind
        layer 0, whose buffers are the same whatever the sequence's length."""
        if self._graphs is None:
            function()
        else:
            self._graphs.run(key, function)

    def _end_step(self, index: torch.Tensor, *, has_verdict: bool) -> None:
        """Decodes and commits the candidates, found at `index` among the rows of the pass."""
        report, state, rule = self._report.device, self._state, self._rule
        count = len(index)
        token, confidence = report.token[:count], report.confidence[:count]
        candidates = report.candidates[:count]
        self._decoder.decode(self._forward.hidden(index), token, confidence)
        ops.commit(
            token,
            confidence,
            candidates,
            rule.rule,
            rule.amount,
            state.key_range,
            self.shape.eos_id,
            state.first_full_layer if has_verdict else None,
            self._depth,
            state.tokens,
            state.masked,
            state.committed,
            state.eos_position,
            state.status,
        )
        at = candidates.clamp(min=0)
        torch.index_select(state.committed.view(-1), 0, at, out=report.is_committed[:count])
        if self.shape.selects_rows:
            self._select_rows()
        self._report.copy()

    def _select_rows(self) -> None:
        """Lists the rows of the next step."""
        state, lists, rolling = self._state, self._lists, self.shape.rolling
        if rolling is not None:
            ops.rolling_rows(
                state.masked,
                state.committed,
                lists.window,
                lists.num_rows,
                state.key_range,
                rolling.ahead,
                rolling.repeats,
                rolling.reach,
                state.due,
                state.tracked[0],
            )
        ops.select_rows(
            state.masked,
            state.committed,
            state.tracked,
            lists.window,
            lists.lookahead,
            lists.rows,
            lists.segments,
            lists.window_rows,
        )
        torch.index_select(lists.rows, 0, lists.window_rows.clamp(min=0), out=lists.candidates)
        lists.candidates.masked_fill_(lists.window_rows < 0, -1)
        lists.window_segments[:, SEGMENT_WINDOW] = lists.segments[:, SEGMENT_WINDOW]

    def _list_rows(self, plan: Plan) -> None:
        """Lists the positions that the plan names, unless they are listed already."""
        if plan.listed == self._listed:
            return
        assert plan.listed is not None
        lists, count, self._listed = self._lists, plan.num_candidates, plan.listed
        slots = torch.arange(plan.listed.start, plan.listed.stop, dtype=torch.int32)
        lists.rows.fill_(-1)[: len(slots)] = slots.to(lists.rows.device)
        lists.candidates.fill_(-1)[:count] = slots[:count].to(lists.rows.device)
        lists.window_rows.fill_(-1)[:count] = torch.arange(
            count, dtype=torch.int32, device=lists.rows.device
        )


class Graphs:
    """Pieces of work as CUDA graphs, by key, in one memory pool.

    The first run of a piece is as it is, which loads its kernels; the second is captured.

    Args:
        stream: where they are captured.
        most: so many keys are kept, those run last; None: all.
    """

    def __init__(self, stream: torch.cuda.Stream, most: int | None = None) -> None:
        self._stream = stream
        self._most = most
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}  # the key run last is the last

    def run(self, key: int, function: Callable[[], None]) -> None:
        """Does what `function` does, which must be the same for the same key."""
        is_new = key not in self._graphs
        graph = self._graphs.pop(key, None)
        if is_new:
            function()
        else:
            graph = graph or self._capture(function)
            graph.replay()
        self._graphs[key] = graph
        if self._most is not None and len(self._graphs) > self._most:
            del self._graphs[next(iter(self._graphs))]

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        # Not torch.cuda.graph, which empties torch's cache of memory and collects garbage.
        graph = torch.cuda.CUDAGraph()
        if not any(self._graphs.values()):
            # Torch gives a pool up with its last graph, and cannot capture into it again.
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph
