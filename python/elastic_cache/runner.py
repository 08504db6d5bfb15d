"""Runs planned steps: buffers of S sequences, their passes through the layers, and what ends them.

    window pass   the listed rows of all sequences through the layers that reuse the cache, decode,
                  commit; on a GPU one captured graph per number of rows
    full pass     the layers from the first failing one on (or all) over every position of one
                  sequence, then the same end; on a GPU a graph per sequence and length
    selection     lists the rows of the next step
A copy of the report to the host ends a step.

The subtle thing: on a GPU nobody looks at the drift test's verdict before the window pass is over.
The commit itself refuses where a test has failed, the host learns of it from the report, and only
then launches the full pass. So a step costs one read-back, and a refreshed one two. Full passes
come after the window pass of a step: what that does to a sequence without rows is overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from elastic_cache import ops
from elastic_cache.cache import Cache
from elastic_cache.decoding import CommitRule, Decoder
from elastic_cache.forward import Forward
from elastic_cache.graphs import Graphs
from elastic_cache.models.weights import Model
from elastic_cache.plan import FullPass, Plan
from elastic_cache.report import SEGMENT_WINDOW, Report, ReportBlock
from elastic_cache.shape import RunnerShape, Start, captured_rows, max_deferred, work_rows
from elastic_cache.state import DecodeState, DriftTest, FullLists, RowLists

BUCKET = 16
"""On a GPU rows are padded to a multiple of this, which is a product's granularity as well."""
LARGE_BUCKET = 64
"""The same beyond 256 rows: there are too many such numbers to capture a step for each."""
MAX_CAPTURED_LENGTHS = 4
"""Full passes that a runner on a GPU keeps captured, of each of its sequences."""


class Runner:
    """Everything S sequences need to be decoded, at fixed addresses; reusable by later requests.

    Args:
        model: weights and shape.
        shape: sizes and kinds of the step.
        capture_stream: where passes on a GPU become CUDA graphs; None launches the same kernels
            one by one, with the same results.
        batch_invariant: on a GPU no bit of a sequence's steps depends on the other sequences.
    """

    def __init__(
        self,
        model: Model,
        shape: RunnerShape,
        capture_stream: torch.cuda.Stream | None,
        batch_invariant: bool = False,
    ) -> None:
        device, depth, count = model.device, model.config.num_layers, shape.num_sequences
        self.shape = shape
        self._depth = depth
        self._is_padded = device.type != "cpu"
        num_candidates = count * shape.num_candidates
        tracking = depth if shape.tests_drift else 0
        self._report = ReportBlock(
            device,
            count,
            depth,
            # Behind those of the window pass come those of every sequence's full pass.
            num_candidates * (2 if count > 1 else 1),
            tracking + shape.lists_of_chosen,
            shape.list_length,
        )
        report = self._report.device
        self._state = DecodeState.allocate(report, shape.capacity, tracking)
        max_rows = work_rows(shape, depth)
        self._lists = RowLists.allocate(report, max_rows, num_candidates)
        self._full = FullLists.allocate(self._state, shape.num_candidates, depth)
        self._drift = self._full_drift = None
        if shape.tests_drift:
            self._drift = drift = DriftTest.allocate(self._state)
            self._full_drift = drift.aside() if count > 1 else drift
        self._tests_drift = torch.zeros(count, dtype=torch.bool, device=device)
        cache = Cache(model.config, count, shape.capacity, shape.needs, device, model.dtype)
        deferred = max_deferred(model, shape)
        self._forward = Forward(model, cache, max_rows, deferred, batch_invariant)
        self._decoder = Decoder(
            model, count, shape.num_candidates, shape.has_noise, batch_invariant
        )
        self._rule = CommitRule(count, device)
        self._graphs = Graphs(capture_stream)
        self._whole_graphs = Graphs(capture_stream, most=MAX_CAPTURED_LENGTHS * count)
        self._starts: list[Start | None] = [None] * count
        self._kept: dict[int, torch.Tensor] = {}
        self._listed: range | None = None
        self._seen = report

    @torch.inference_mode()
    def start(self, sequence: int, start: Start) -> None:
        """Begins a sequence, whose first plan must be a full pass."""
        self._starts[sequence] = start
        self._listed = None
        self._state.start(sequence, start.ids, start.masked)
        self._unlist(sequence)
        self._full.window[sequence, sequence] = start.window
        self._decoder.start(sequence, start.settings)
        self._rule.start(sequence, start.settings)
        if self._drift is not None:
            # Rows that `rolling` chose are compared as well, and sent nowhere.
            gamma = start.settings.gamma if start.tests_drift else -math.inf
            self._drift.gamma[sequence].fill_(gamma)

    @torch.inference_mode()
    def stop(self, sequence: int) -> None:
        """Ends a sequence: from the next selection on it has no rows."""
        self._starts[sequence] = None
        self._kept.pop(sequence, None)
        self._state.stop(sequence)
        self._unlist(sequence)

    @torch.inference_mode()
    def launch(self, plans: Mapping[int, Plan], is_ahead: bool = False) -> int:
        """Enqueues a step of the sequences in `plans`; on the CPU it is done on return.

        Args:
            plans: by sequence; there may be rows of others in the lists, which do not matter.
            is_ahead: the step before may still run, so that no report has counted what is listed:
                at most what the plans say, and nothing of others.

        Returns:
            Which report it makes, for `wait` and `finish`.
        """
        windows = {s: plan for s, plan in plans.items() if not plan.is_full}
        if windows:
            self._launch_window(windows, is_ahead)
        full = [s for s, plan in plans.items() if plan.is_full]
        for sequence in full:
            self._launch_full(sequence, plans[sequence])
        if full:
            self._graphs.run("select", self._select)
        return self._report.copy()

    def wait(self, report: int) -> None:
        """Waits for what was launched."""
        self._report.wait(report)

    def wait_nearly(self) -> None:
        """Waits until of what was launched last an eighth of the layers are left, or fewer."""
        self._forward.wait_nearly()

    @torch.inference_mode()
    def finish(self, report: int) -> Report:
        """Waits for what was launched. A sequence whose `first_full_layer` is below L has failed
        its drift test and committed nothing: it is to be refreshed, or held."""
        self._seen = self._report.read(report)
        return self._seen

    @torch.inference_mode()
    def prepare(self, sequence: int, plan: Plan) -> None:
        """Takes over what `plan`, of a full pass, says, if `refresh` is to run it."""
        if plan.num_commits is not None:
            self._rule.fix(sequence, plan.num_commits)
        self._draw(sequence, plan.num_candidates)

    @torch.inference_mode()
    def refresh(self, passes: Mapping[int, FullPass], held: Iterable[int] = ()) -> Report:
        """Runs sequences in full mode, commits where a pass is over, and waits.

        Args:
            passes: layers by sequence.
            held: sequences whose passes are not over; until then they have no rows.
        """
        for sequence in held:
            self._kept[sequence] = self._state.tracked[:, sequence].clone()
            self._unlist(sequence)
        for sequence, part in passes.items():
            if part.end < self._depth:
                self._run_layers(sequence, part.begin, part.end)
                continue
            kept = self._kept.pop(sequence, None)
            if kept is not None:
                self._state.tracked[:, sequence].copy_(kept)
            self._run_full(sequence, part)
        return self.select()

    @torch.inference_mode()
    def select(self) -> Report:
        """Lists the rows anew, after sequences were stopped, and waits."""
        self._graphs.run("select", self._select)
        return self.finish(self._report.copy())

    def full_begin(self, sequence: int) -> int:
        """Where a report has the candidates of a sequence that ran a full pass."""
        count = self.shape.num_sequences
        return (count + sequence) * self.shape.num_candidates if count > 1 else 0

    # --- window pass -------------------------------------------------------------------------

    def _launch_window(self, plans: Mapping[int, Plan], is_ahead: bool) -> None:
        counts = [(0, 0)] * self.shape.num_sequences
        if not is_ahead:
            segments = self._seen.segments.tolist()
            counts = [(sum(part[1:]), part[SEGMENT_WINDOW]) for part in segments]
        for sequence, plan in plans.items():
            counts[sequence] = plan.num_rows, plan.num_candidates
            if plan.listed is not None:
                self._list_rows(plan)
            if plan.num_commits is not None:
                self._rule.fix(sequence, plan.num_commits)
        num_rows, sizes = sum(rows for rows, _ in counts), [size for _, size in counts]
        samples = self._decoder.samples(plans)
        if samples:
            for sequence in plans:
                self._draw(sequence, sizes[sequence])
            self._decoder.gather(sizes)
        tests_drift = any(self._start_of(s).tests_drift for s in plans)
        parts = [size for size in sizes if size]
        if self._is_padded:
            num_rows = _padded(num_rows)
            parts = [self._padded_candidates(sum(parts))]

        def run() -> None:
            self._run_window(num_rows, parts, samples, tests_drift)

        if num_rows > captured_rows(self.shape):
            run()
        else:
            self._graphs.run((num_rows, *parts, samples, tests_drift), run)

    def _padded_candidates(self, count: int) -> int:
        if self.shape.num_sequences == 1:
            return self.shape.num_candidates
        return min(_padded(count), len(self._lists.candidates))

    def _draw(self, sequence: int, count: int) -> None:
        """Draws the noise of a step of `count` candidates; on a GPU it is always as much."""
        if self._is_padded:
            count = self._start_of(sequence).window or self.shape.num_candidates
        self._decoder.draw(sequence, count)

    def _run_window(
        self, num_rows: int, parts: list[int], samples: bool, tests_drift: bool
    ) -> None:
        lists, state, drift = self._lists, self._state, self._drift if tests_drift else None
        if self.shape.num_sequences == 1:
            state.first_full_layer.fill_(self._depth)
        else:
            # A sequence without rows counts as one that failed: its commits are left as they are.
            is_listed = lists.segments[:, SEGMENT_WINDOW] > 0
            torch.mul(is_listed, self._depth, out=state.first_full_layer)
        is_whole = self._forward.run_rows(lists.rows[:num_rows], lists.segments, state, drift)
        if drift is not None and self.shape.num_sequences > 1:
            drift.tracked.masked_fill_(~self._tests_drift[None, :, None], -1)
        if not is_whole:
            return
        index = lists.window_rows[: sum(parts)]
        has_verdict = tests_drift or self.shape.num_sequences > 1
        noise = self._decoder.noise(None, len(index)) if samples else None
        self._commit(0, index, parts, noise, state.first_full_layer if has_verdict else None)
        if self.shape.rolling is not None:
            self._choose(slice(None))
        self._select()

    # --- full pass ---------------------------------------------------------------------------

    def _launch_full(self, sequence: int, plan: Plan) -> None:
        start = self._start_of(sequence)
        if plan.listed is not None:
            self._list_rows(plan)
        self.prepare(sequence, plan)
        self._list(sequence)
        count = self.shape.num_candidates if self._is_padded else plan.num_candidates
        samples = self._decoder.samples([sequence])

        def run() -> None:
            self._run_layers(sequence, 0, self._depth)
            self._track_full(sequence, 0, count)
            self._end_full(sequence, count, samples)

        key = (sequence, len(start.ids), count, samples, start.tests_drift)
        self._whole_graphs.run(key, run)
        self._forget_commits(sequence)

    def _forget_commits(self, sequence: int) -> None:
        """Of a request that does not reuse the cache nothing is to be computed anew. Not part of
        the graph, which a request of the same length that does reuse it replays."""
        if not self._start_of(sequence).reuses:
            self._state.committed[sequence].fill_(False)

    def _run_full(self, sequence: int, part: FullPass) -> None:
        """The last layers of a pass, whose noise has been drawn, and the end of the step."""
        count = self.shape.num_candidates
        if not self._is_padded:
            masked = int(self._state.masked[sequence].sum())
            count = min(self._start_of(sequence).window, masked)
        samples = self._decoder.samples([sequence])
        self._list(sequence)
        self._run_layers(sequence, part.begin, part.end)
        self._track_full(sequence, part.first, count)
        self._graphs.run(
            ("end", sequence, count, samples), lambda: self._end_full(sequence, count, samples)
        )
        self._forget_commits(sequence)

    def _run_layers(self, sequence: int, first: int, end: int) -> None:
        begin, length = sequence * self.shape.capacity, len(self._start_of(sequence).ids)
        self._forward.run_full(first, end, begin, length, self._state)

    def _track_full(self, sequence: int, first: int, count: int) -> None:
        """Lists a sequence's candidates, and has layers `first` .. L - 1 choose what they track."""
        state, full, start = self._state, self._full, self._start_of(sequence)
        if self.shape.selects_rows:
            ops.select_rows(
                state.masked,
                full.committed,
                full.tracked,
                full.window[sequence],
                full.lookahead,
                full.rows,
                full.segments,
                full.window_rows,
            )
        drift = self._full_drift if start.tests_drift else None
        if drift is None:
            return
        self._forward.track_full(first, full.rows[:count], full.segments, state, drift)
        if drift is not self._drift and self._drift is not None:
            self._drift.tracked[first:, sequence].copy_(drift.tracked[first:, sequence])

    def _end_full(self, sequence: int, count: int, samples: bool) -> None:
        report, full, state = self._report.device, self._full, self._state
        begin = self.full_begin(sequence)
        source = full.rows if self.shape.selects_rows else self._lists.candidates
        report.candidates[begin : begin + count].copy_(source[:count])
        index = source[:count] - sequence * self.shape.capacity
        noise = self._decoder.noise(sequence, count) if samples else None
        self._commit(begin, index, [count], noise, full.verdict[sequence])
        one = slice(sequence, sequence + 1)
        if self.shape.rolling is not None:
            state.due[one].zero_()
            self._choose(one)

    # --- what ends a pass --------------------------------------------------------------------

    def _commit(
        self,
        begin: int,
        index: torch.Tensor,
        parts: list[int],
        noise: torch.Tensor | None,
        verdict: torch.Tensor | None,
    ) -> None:
        """Decodes and commits the candidates, found at `index` among the rows of the pass; in the
        report they stand from `begin` on."""
        report, state, rule = self._report.device, self._state, self._rule
        end = begin + len(index)
        token, confidence = report.token[begin:end], report.confidence[begin:end]
        candidates = report.candidates[begin:end]
        self._decoder.decode(self._forward.hidden(index), noise, parts, token, confidence)
        ops.commit(
            token,
            confidence,
            candidates,
            rule.rule,
            rule.amount,
            state.key_range,
            self.shape.eos_id,
            verdict,
            self._depth,
            state.tokens,
            state.masked,
            state.committed,
            state.eos_position,
            state.status,
        )
        at = candidates.clamp(min=0)
        torch.index_select(state.committed.view(-1), 0, at, out=report.is_committed[begin:end])

    def _choose(self, which: slice) -> None:
        """The rows most due, of the sequences that have a number of rows to fill."""
        state, lists, rolling = self._state, self._lists, self.shape.rolling
        assert rolling is not None
        ops.rolling_rows(
            state.masked[which],
            state.committed[which],
            lists.window[which],
            lists.num_rows[which],
            state.key_range[which],
            rolling.ahead,
            rolling.repeats,
            rolling.reach,
            state.due[which],
            state.chosen[which],
        )

    def _select(self) -> None:
        """Lists the rows of the next step."""
        state, lists, shape = self._state, self._lists, self.shape
        if shape.selects_rows:
            if shape.rolling is not None and shape.num_sequences > 1:
                chosen = state.chosen.view(shape.num_sequences, -1, shape.list_length)
                state.tracked[-shape.lists_of_chosen :].copy_(chosen.transpose(0, 1))
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
            at = lists.window_rows.clamp(min=0)
            torch.index_select(lists.rows, 0, at, out=lists.candidates)
            lists.candidates.masked_fill_(lists.window_rows < 0, -1)

    # --- lists -------------------------------------------------------------------------------

    def _start_of(self, sequence: int) -> Start:
        start = self._starts[sequence]
        assert start is not None, "start comes first"
        return start

    def _list(self, sequence: int) -> None:
        """From the next selection on the sequence has rows, if its steps reuse the cache."""
        start, lists = self._start_of(sequence), self._lists
        if not start.reuses:
            return
        lists.window[sequence].fill_(start.window)
        lists.lookahead[sequence].fill_(start.lookahead)
        lists.num_rows[sequence].fill_(start.num_rows)
        self._tests_drift[sequence].fill_(start.tests_drift)

    def _unlist(self, sequence: int) -> None:
        for values in (self._lists.window, self._lists.lookahead, self._lists.num_rows):
            values[sequence].fill_(0)
        self._tests_drift[sequence].fill_(False)

    def _list_rows(self, plan: Plan) -> None:
        """Lists the positions that the plan names, unless they are listed already."""
        if plan.listed == self._listed:
            return
        assert plan.listed is not None and self.shape.num_sequences == 1
        lists, count, self._listed = self._lists, plan.num_candidates, plan.listed
        slots = torch.arange(plan.listed.start, plan.listed.stop, dtype=torch.int32)
        lists.rows.fill_(-1)[: len(slots)] = slots.to(lists.rows.device)
        lists.candidates.fill_(-1)[:count] = slots[:count].to(lists.rows.device)
        lists.window_rows.fill_(-1)[:count] = torch.arange(
            count, dtype=torch.int32, device=lists.rows.device
        )


def _padded(count: int) -> int:
    bucket = BUCKET if count <= 4 * LARGE_BUCKET else LARGE_BUCKET
    return -(-count // bucket) * bucket
