"""The one loop: plan -> launch -> finish -> event, of all sequences that share a runner.

    policy.plan      which rows a sequence computes in this step
    runner.launch    the layers against the cache, a token and a confidence per candidate, the
                     commit, and the rows of the next step
    runner.finish    waits; layers behind a failed drift test are then refreshed
On a GPU the next step is launched before the host knows what the one under way does, where it
must not know: every request has as many rows whatever that is (`Policy.steady_rows`). Else it is as
soon as the report says who goes on. Either way nobody has been told yet what the step did, so the
GPU waits neither for that nor for who reads it. Who joins or leaves meanwhile does so one step
later; who was there when `wait` returned takes part.

Full passes (a request's first step, the steps of policy `none`, refreshes) run sequence by
sequence, in a step as many layers of them as `max_full_rows` rows through all layers make: what is
beyond waits for the next step. A sequence's own steps and tokens do not depend on that, nor on who
else is in the batch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from elastic_cache.config import MAX_FULL_ROWS, GenerationConfig, find_settings
from elastic_cache.errors import NonFiniteLogitsError
from elastic_cache.models.weights import Model
from elastic_cache.plan import FullPass, Plan
from elastic_cache.policies import Policy, make_policy
from elastic_cache.prompt import Prompt, encode_prompt
from elastic_cache.readout import Done, Launched, Pending, Reader
from elastic_cache.report import Report
from elastic_cache.request import Request
from elastic_cache.runner import Runner
from elastic_cache.shape import Start
from elastic_cache.turns import Turns
from elastic_cache.types import Message, Step


@dataclass(frozen=True)
class Outcome:
    """What a step of a batch was for one of its requests.

    Attributes:
        request: whose.
        step: what its step did; None when it failed, or had nothing to decode.
        error: why it failed; it has left the batch then.
    """

    request: Request
    step: Step | None
    error: Exception | None = None

    @property
    def is_over(self) -> bool:
        """Whether the request has left the batch: finished or failed."""
        return self.error is not None or self.request.is_finished


class Batch:
    """Requests that share every step's stream of the weights.

    Args:
        model: the loaded model.
        runner: decodes up to `runner.shape.num_sequences` of them.
        max_full_rows: full passes of a step have at most so many rows times the model's layers,
            but always a layer.
        is_alone: the runner was made for a single request, whose steps are its own iterator's.
        give_back: called with the runner when the last request has finished; not after a failure,
            so that whatever went wrong is gone.
    """

    def __init__(
        self,
        model: Model,
        runner: Runner,
        max_full_rows: int = MAX_FULL_ROWS,
        is_alone: bool = False,
        give_back: Callable[[Runner], None] | None = None,
    ) -> None:
        self._model = model
        self._runner = runner
        self._is_alone = is_alone
        self._give_back = give_back
        self._depth = model.config.num_layers
        self._runs_ahead = model.device.type != "cpu"
        self._lanes: list[Request | None] = [None] * runner.shape.num_sequences
        self._launched: dict[int, Launched] = {}  # the step under way, by lane
        self._report = 0  # which one that step makes
        self._held: dict[int, Pending] = {}  # until their full passes are over
        self._turns = Turns(len(self._lanes), self._depth, max_full_rows)
        self._reader: Reader | None = None  # of the last report
        self._is_stale = False  # rows are listed of a sequence that was stopped or has failed

    @property
    def num_free(self) -> int:
        """Requests that may be added now."""
        return self._lanes.count(None)

    @property
    def max_length(self) -> int:
        """Tokens of a request, prompt and gen_length together, at most."""
        return self._runner.shape.capacity

    @property
    def requests(self) -> Sequence[Request]:
        """Those being answered."""
        return tuple(request for request in self._lanes if request is not None)

    def add(
        self, prompt: str | Sequence[Message] | Sequence[int] | torch.Tensor, **settings: Any
    ) -> Request:
        """Begins a request, which takes part from the next step on.

        Args:
            prompt, settings: as of `Engine.generate`.

        Raises:
            ValueError: a sentence naming the argument and the rule it breaks; the batch is as it
                was.
            RuntimeError: every lane is taken.
        """
        config = find_settings(settings)
        encoded = encode_prompt(self._model, prompt, config.gen_length)
        policy = make_policy(encoded.masked.tolist(), config, self._model.config.eos_id)
        return self.begin(encoded, config, policy)

    def begin(self, prompt: Prompt, settings: GenerationConfig, policy: Policy) -> Request:
        """`add`, of an encoded prompt, validated settings and their policy, not yet asked."""
        if not self.num_free:
            raise RuntimeError(f"all {len(self._lanes)} lanes of the batch are taken: step it on")
        self.check(prompt, settings, policy)
        advance = self._advance if self._is_alone else _refuse
        request = Request(self._model, prompt, settings, policy, advance)
        lane = self._lanes.index(None)
        self._runner.start(lane, make_start(prompt, settings, policy))
        # A request that is alone keeps its batch alive, not the other way round: when nobody wants
        # it any more, the memory is free at once.
        self._lanes[lane] = weakref.proxy(request) if self._is_alone else request
        self._turns.join(lane)
        return request

    def check(self, prompt: Prompt, settings: GenerationConfig, policy: Policy) -> None:
        """Whether a request could begin if a lane were free; looks at nothing that changes.

        Raises:
            ValueError: a sentence naming the argument and the rule it breaks.
        """
        shape, length = self._runner.shape, len(prompt.ids)
        together = "requests that are answered together"
        if self._is_alone:
            return
        if not policy.window:
            raise ValueError(
                f"policy {settings.policy!r} decodes one request at a time: {together} have "
                "policy elastic, rolling or none"
            )
        if length > shape.capacity:
            raise ValueError(
                f"the prompt and gen_length make {length} tokens, but {together} have at most "
                f"{shape.capacity}"
            )
        for name, value, most in (
            ("window", policy.window, shape.num_candidates),
            ("num_rows", policy.num_rows, shape.num_chosen),
        ):
            if value > most:
                raise ValueError(f"{name} must be at most {most} for {together}, got {value}")
        if policy.tests_drift and settings.track_num != shape.track_num:
            raise ValueError(
                f"track_num must be {shape.track_num} for {together}, got {settings.track_num}"
            )
        if policy.lookahead:
            raise ValueError(f"block_caching must be True for {together}")

    def wait(self) -> None:
        """Waits until `step` should be called, and changes nothing: requests that are added before
        it is take part in the step that it launches."""
        if self._foresees():
            self._runner.wait_nearly()
        elif self._launched:
            self._runner.wait(self._report)

    def step(self) -> list[Outcome]:
        """One denoising step of the requests; of some of them none if full passes are waiting.

        A request that fails leaves; the others go on.
        """
        outcomes = [] if self._launched or self._turns else self._launch()
        report_under_way = self._report
        ahead = self._launch_ahead() if self._foresees() else None
        report = self._runner.finish(report_under_way) if self._launched else None
        over, report = self._refresh(report)
        launched, self._launched = self._launched, {}
        self._turns.finish()
        steps: list[Done] = []
        if report is not None:
            self._reader = reader = Reader(report, self._runner.shape.capacity)
            for lane, done in launched.items():
                steps.append(self._observe(lane, reader, done, None))
            for lane, pending in over.items():
                done = replace(pending.launched, begin=self._runner.full_begin(lane))
                steps.append(self._observe(lane, reader, done, pending))
        unstarted: list[Outcome] = []
        if ahead is not None:
            self._follow(ahead, reader)
        elif self._runs_ahead:
            unstarted = self._launch()
        outcomes += [self._settle(reader, done) for done in steps] + unstarted
        if self._give_back is not None and not self.requests:
            self._give_back(self._runner)
            self._give_back = None
        return outcomes

    def remove(self, request: Request) -> None:
        """Takes a request out between two steps: `request.stop` has its answer as it stands."""
        lane = self._lanes.index(request)
        self._launched.pop(lane, None)
        self._leave(lane)
        self._is_stale = True

    # --- parts of a step ---------------------------------------------------------------------

    def _launch(self) -> list[Outcome]:
        """Enqueues the next step of everyone who can take part; who has nothing to decode is
        over."""
        if self._is_stale:
            self._reader = Reader(self._runner.select(), self._runner.shape.capacity)
            self._is_stale = False
        reader, outcomes = self._reader, []
        plans: dict[int, Plan] = {}
        for lane, request in self._taken():
            if lane in self._held:
                continue
            counts = (0, 0) if reader is None else reader.counts(lane)
            plan = request.policy.plan(*counts)
            if plan is not None:
                plans[lane] = plan
                continue
            self._leave(lane)
            request.finish()
            outcomes.append(Outcome(request, None))
        plans = self._take_turns(plans, reader)
        self._report = self._runner.launch(plans)
        self._launched = {lane: self._remember(lane, plan, reader) for lane, plan in plans.items()}
        return outcomes

    def _foresees(self) -> bool:
        """Whether the next step can be launched before the one under way is over."""
        if not self._runs_ahead or not self._launched or self._held or self._is_stale:
            return False
        lengths = []  # of who joins
        for lane, request in self._taken():
            if lane not in self._launched:
                if request.policy.plan(0, 0) is None:
                    return False
                lengths.append(self._length(lane))
            elif not request.policy.steady_rows or request.settings.temperature > 0:
                return False
        return self._turns.fits(lengths)

    def _launch_ahead(self) -> dict[int, Plan]:
        """Enqueues the step after the one under way, of everyone who may take part: whose answer
        turns out to be finished has room for its rows in it, and none."""
        plans: dict[int, Plan] = {}
        for lane, request in self._taken():
            policy = request.policy
            plan = policy.plan(0, 0)
            if lane in self._launched:
                plan = Plan(False, policy.steady_rows, policy.window)
            assert plan is not None
            plans[lane] = plan
        plans = self._take_turns(plans, None)
        self._report = self._runner.launch(plans, is_ahead=True)
        return plans

    def _follow(self, plans: dict[int, Plan], reader: Reader) -> None:
        """Goes on with a step that was launched ahead: without those whose answers the step before
        has finished."""
        self._launched = {}
        for lane, plan in plans.items():
            request = self._lanes[lane]
            if request is None:
                continue
            known = plan if plan.is_full else request.policy.plan(*reader.counts(lane))
            assert known is not None
            self._launched[lane] = self._remember(lane, known, reader)

    def _take_turns(self, plans: dict[int, Plan], reader: Reader | None) -> dict[int, Plan]:
        """Decides whose full passes run in this step, and returns the plans to launch: without
        those that wait, and those that begin and will not be over, which are held."""
        waiting = {lane: (self._length(lane), step.next_layer) for lane, step in self._held.items()}
        waiting |= {lane: (self._length(lane), 0) for lane, plan in plans.items() if plan.is_full}
        self._turns.begin(waiting, is_bounded=len(self.requests) > 1)
        launched = {}
        for lane, plan in plans.items():
            end = self._turns.end(lane) if plan.is_full else self._depth
            if end == self._depth:
                launched[lane] = plan
            elif end is not None:
                self._runner.prepare(lane, plan)
                self._held[lane] = Pending(self._remember(lane, plan, reader), 0, [], 0)
        return launched

    def _remember(self, lane: int, plan: Plan, reader: Reader | None) -> Launched:
        request, begin = self._lanes[lane], 0
        assert request is not None
        if plan.is_full:
            begin = self._runner.full_begin(lane)
        if plan.listed is not None:
            candidates = list(plan.listed[: plan.num_candidates])
        elif plan.is_full or reader is None:
            candidates = request.candidates(plan.num_candidates)
        else:
            begin, candidates = reader.candidates(lane)
        return Launched(plan, candidates, begin)

    def _refresh(self, report: Report | None) -> tuple[dict[int, Pending], Report | None]:
        """Goes on with the full passes of those whose drift test has failed or who are held, as
        far as may be.

        Returns whose are over, and the report; both are no longer under way.
        """
        pending = dict(self._held)
        if report is not None:
            verdicts = report.first_full_layer.tolist()
            for lane, launched in self._launched.items():
                first = verdicts[lane]
                if not launched.plan.is_full and first < self._depth:
                    similarity = report.similarity[:first, lane].tolist()
                    pending[lane] = Pending(launched, first, similarity, first)
                    self._turns.take(lane, self._length(lane), first)
        passes = {
            lane: FullPass(step.first_full, step.next_layer, end)
            for lane, step in pending.items()
            if (end := self._turns.end(lane)) is not None
        }
        over = {lane: pending[lane] for lane, part in passes.items() if part.end == self._depth}
        newly_held = [lane for lane in pending if lane not in over and lane not in self._held]
        self._held = {
            lane: replace(step, next_layer=passes[lane].end) if lane in passes else step
            for lane, step in pending.items()
            if lane not in over
        }
        for lane in pending:
            self._launched.pop(lane, None)
        if passes or newly_held:
            report = self._runner.refresh(passes, newly_held)
        return over, report

    def _observe(
        self,
        lane: int,
        reader: Reader,
        launched: Launched,
        pending: Pending | None,
    ) -> Done:
        """What the next step must know of a sequence's step: who is over or has failed leaves."""
        request, is_last = self._lanes[lane], False
        assert request is not None
        commits, num_masked = reader.commits(launched), reader.num_masked(lane)
        if reader.has_failed(lane):
            self._leave(lane)
            self._is_stale, self._give_back = True, None
        else:
            request.commit(commits.positions, commits.tokens, num_masked)
            is_last = request.policy.plan(0, 0) is None
            if is_last:
                self._leave(lane)
        return Done(lane, request, launched, commits, pending, is_last)

    def _settle(self, reader: Reader, done: Done) -> Outcome:
        """Tells a request what its step did."""
        request = done.request
        try:
            step = request.add(reader.read(done, self._depth))
        except NonFiniteLogitsError as error:
            return Outcome(request, None, error)
        if done.is_last:
            request.finish()
        return Outcome(request, step)

    def _advance(self) -> Step | None:
        """A step of the only request."""
        (outcome,) = self.step()
        if outcome.error is not None:
            raise outcome.error
        return outcome.step

    def _leave(self, lane: int) -> None:
        self._lanes[lane] = None
        self._held.pop(lane, None)
        self._runner.stop(lane)

    def _taken(self) -> list[tuple[int, Request]]:
        return [(lane, request) for lane, request in enumerate(self._lanes) if request is not None]

    def _length(self, lane: int) -> int:
        request = self._lanes[lane]
        return 0 if request is None else len(request.prompt.ids)


def make_start(prompt: Prompt, settings: GenerationConfig, policy: Policy) -> Start:
    """What a runner has to know of a request."""
    return Start(
        ids=prompt.ids,
        masked=prompt.masked,
        window=policy.window,
        lookahead=policy.lookahead,
        num_rows=policy.num_rows,
        tests_drift=policy.tests_drift,
        reuses=policy.needs.keys_values,
        settings=settings,
    )


def _refuse() -> Step | None:
    raise RuntimeError("the request is one of a batch: step the batch")
