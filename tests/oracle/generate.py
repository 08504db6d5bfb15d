"""Decoding by every policy (none, prefix, dual, elastic, rolling), written from the specification.

Plain loops over layers and Python sets of positions. Every step also records by how much each
kind of decision was taken, so that a comparison in another precision may tell a near-tie from a
disagreement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from .model import OracleModel


@dataclass(frozen=True)
class Options:
    gen_length: int
    policy: str = "elastic"
    window: int = 16
    gamma: float = 0.9
    threshold: float = 0.9
    track_num: int = 1
    block_caching: bool = True
    block_length: int = 32
    num_rows: int = 96
    tokens_per_step: int | None = None
    steps: int | None = None
    factor: float | None = None


@dataclass
class Margins:
    """The smallest distance of each kind of decision of one step from its opposite.

    drift: |sim - gamma| over the tests made. tracked: gap in summed attention between the last
    chosen and the first refused key, relative to it where it exceeds 1. commit: distance of a
    confidence from the bar it was held to. token: log-probability gap of the two best tokens of
    a committed position.
    """

    drift: float = math.inf
    tracked: float = math.inf
    commit: float = math.inf
    token: float = math.inf

    def narrow(self, kind: str, margin: float) -> None:
        setattr(self, kind, min(getattr(self, kind), margin))


@dataclass
class StepRecord:
    first_full_layer: int
    committed: list[int]
    tokens: list[int]
    tracked: list[int]
    rows: list[int]
    sims: list[float]
    margins: Margins


@dataclass
class Result:
    ids: torch.Tensor
    steps: list[StepRecord]
    num_layers: int
    num_tokens: int
    eos_position: int | None

    @property
    def nfe(self) -> int:
        return len(self.steps)

    @property
    def update_frequency(self) -> float:
        full = sum(self.num_layers - step.first_full_layer for step in self.steps)
        return full / (self.num_layers * len(self.steps)) if self.steps else 0.0


@dataclass
class State:
    """Tokens, the set of masked positions, and the EOS that cut the tail (None: not yet)."""

    ids: torch.Tensor
    masked: set[int]
    generated: list[int]
    eos_position: int | None = None
    steps: list[StepRecord] = field(default_factory=list)

    def leftmost(self, count: int) -> list[int]:
        return sorted(self.masked)[:count]


def generate(model: OracleModel, prompt: list[int], options: Options) -> Result:
    ids = torch.tensor(prompt + [model.mask_id] * options.gen_length)
    generated = [i for i, token in enumerate(ids.tolist()) if token == model.mask_id]
    state = State(ids, set(generated), generated)
    if options.policy == "none":
        decode_without_cache(model, state, options)
    elif options.policy == "elastic":
        decode_elastic(model, state, options)
    elif options.policy == "rolling":
        decode_rolling(model, state, options)
    else:
        decode_blocks(model, state, options)
    return finish(model, state)


def finish(model: OracleModel, state: State) -> Result:
    if state.eos_position is not None:
        for position in state.generated:
            if position > state.eos_position:
                state.ids[position] = model.eos_id
    num_tokens = 0
    for position in state.generated:
        if state.ids[position] == model.eos_id:
            break
        num_tokens += 1
    return Result(state.ids, state.steps, model.num_layers, num_tokens, state.eos_position)


# ---- what is committed -----------------------------------------------------------------------


def choose(confidence: list[float], options: Options, count: int | None, margins: Margins) -> int:
    """How many of the candidates, best first, are committed; `confidence` is descending."""
    n = len(confidence)
    if count is not None:
        taken = min(count, n)
        if taken < n:
            margins.narrow("commit", confidence[taken - 1] - confidence[taken])
        return taken
    taken = 1
    if options.factor is not None:
        while taken < n:
            bar = 1 - options.factor / (taken + 2)
            margins.narrow("commit", abs(confidence[taken] - bar))
            if confidence[taken] < bar:
                margins.narrow("commit", confidence[taken - 1] - confidence[taken])
                break
            taken += 1
        return taken
    bar = min(options.threshold, confidence[0])
    for value in confidence[1:]:
        margins.narrow("commit", abs(value - bar))
    return sum(value >= bar for value in confidence)


def commit(
    model: OracleModel,
    state: State,
    candidates: list[int],
    logits: torch.Tensor,
    options: Options,
    margins: Margins,
    count: int | None,
) -> list[int]:
    """Write the chosen candidates' tokens; logits [candidates, vocab]. Returns their positions."""
    log_probs = torch.log_softmax(logits.double(), -1)
    best = log_probs.topk(2, dim=-1)
    confidence = best.values[:, 0].exp().tolist()
    order = sorted(range(len(candidates)), key=lambda i: (-confidence[i], candidates[i]))
    taken = choose([confidence[i] for i in order], options, count, margins)
    new = []
    for i in order[:taken]:
        margins.narrow("token", (best.values[i, 0] - best.values[i, 1]).item())
        state.ids[candidates[i]] = best.indices[i, 0]
        state.masked.discard(candidates[i])
        new.append(candidates[i])
    return sorted(new)


def first_eos(model: OracleModel, state: State, new: list[int]) -> int | None:
    """Leftmost EOS of the first step that commits one; None at any other step."""
    if state.eos_position is not None:
        return None
    return next((p for p in new if state.ids[p] == model.eos_id), None)


def drop_tail(model: OracleModel, state: State, new: list[int]) -> None:
    position = first_eos(model, state, new)
    if position is not None:
        state.eos_position = position
        state.masked = {p for p in state.masked if p < position}


def record(
    state: State,
    first_full_layer: int,
    new: list[int],
    tracked: list[int],
    rows: list[int],
    sims: list[float],
    margins: Margins,
) -> None:
    tokens = [int(state.ids[p]) for p in new]
    state.steps.append(StepRecord(first_full_layer, new, tokens, tracked, rows, sims, margins))


# ---- none ------------------------------------------------------------------------------------


def decode_without_cache(model: OracleModel, state: State, options: Options) -> None:
    everything = list(range(len(state.ids)))
    while state.masked:
        margins = Margins()
        window = state.leftmost(options.window)
        logits = model.forward(state.ids)[window]
        new = commit(model, state, window, logits, options, margins, options.tokens_per_step)
        drop_tail(model, state, new)
        record(state, 0 if state.steps else -1, new, [], everything, [], margins)


# ---- prefix and dual -------------------------------------------------------------------------


def decode_blocks(model: OracleModel, state: State, options: Options) -> None:
    length, size = len(state.ids), options.block_length
    keys: list[torch.Tensor] = [torch.empty(0)] * model.num_layers
    values: list[torch.Tensor] = [torch.empty(0)] * model.num_layers
    starts = range(min(state.masked, default=length), length, size)
    for start in starts:
        end = min(start + size, length)
        counts = planned_counts(state, start, end, len(starts), options)
        is_first = True
        while any(start <= p < end for p in state.masked):
            if is_first:
                rows = list(range(length))
            elif options.policy == "prefix":
                rows = list(range(start, length))
            else:
                rows = list(range(start, end))
            hidden = forward_rows(model, state.ids, rows, keys, values)
            candidates = [p for p in sorted(state.masked) if start <= p < end]
            logits = model.logits(hidden[[rows.index(p) for p in candidates]])
            margins = Margins()
            count = counts.pop(0) if options.steps is not None else options.tokens_per_step
            new = commit(model, state, candidates, logits, options, margins, count)
            if (position := first_eos(model, state, new)) is not None:
                state.eos_position = position
            first_full = model.num_layers if not is_first else (0 if state.steps else -1)
            record(state, first_full, new, [], rows, [], margins)
            is_first = False
        if state.eos_position is not None:
            return


def planned_counts(
    state: State, start: int, end: int, num_blocks: int, options: Options
) -> list[int]:
    """Commits per step of one block when `steps` is given: spread evenly, remainder first."""
    if options.steps is None:
        return []
    steps = max(1, options.steps // num_blocks)
    masks = sum(start <= p < end for p in state.masked)
    return [masks // steps + (i < masks % steps) for i in range(steps)]


def forward_rows(
    model: OracleModel,
    ids: torch.Tensor,
    rows: list[int],
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    """The last layer's output at `rows`; their keys and values replace the cached ones."""
    is_whole = len(rows) == len(ids)
    positions = torch.tensor(rows)
    x = model.embed(ids[rows])
    for layer in range(model.num_layers):
        q, k, v = model.qkv(layer, x, positions)
        if is_whole:
            keys[layer], values[layer] = k, v
        else:
            keys[layer][rows], values[layer][rows] = k, v
        x = model.finish_layer(layer, x, model.weights(q, keys[layer]), values[layer])
    return x


# ---- rolling ---------------------------------------------------------------------------------


def decode_rolling(model: OracleModel, state: State, options: Options) -> None:
    """`tracked` of a step's record are the cached positions that the next step computes anew."""
    everything = list(range(len(state.ids)))
    keys: list[torch.Tensor] = [torch.empty(0)] * model.num_layers
    values: list[torch.Tensor] = [torch.empty(0)] * model.num_layers
    waiting = {p: Waiting() for p in everything}
    rows = everything
    while state.masked:
        margins = Margins()
        window = state.leftmost(options.window)
        hidden = forward_rows(model, state.ids, rows, keys, values)
        logits = model.logits(hidden[[rows.index(p) for p in window]])
        computed = rows
        new = commit(model, state, window, logits, options, margins, options.tokens_per_step)
        drop_tail(model, state, new)
        chosen, rows = rolling_choice(state, new, options, waiting)
        first_full = model.num_layers if state.steps else -1
        record(state, first_full, new, chosen, computed, [], margins)


@dataclass
class Waiting:
    """Why a position should be computed soon: it has turns to come, or it has waited for long."""

    turns: int = 0
    waited: int = 0


def rolling_choice(
    state: State, new: list[int], options: Options, waiting: dict[int, Waiting]
) -> tuple[list[int], list[int]]:
    """Cached positions to compute in the next step, and all positions of that step.

    Three more turns for what was just committed, one for each of the 8 masks behind the window;
    waiting counts less the further from the leftmost mask, half at a distance of 16.
    """
    masks, window = sorted(state.masked), state.leftmost(options.window)
    needed = sorted({*new, *window})
    first = masks[0] if masks else len(waiting)
    for position, entry in waiting.items():
        if position not in needed:
            entry.waited += 16 * 1024 // (16 + abs(position - first))
    for position in masks[len(window) : len(window) + 8]:
        if waiting[position].turns == 0:
            waiting[position] = Waiting(turns=1)
    for position in window:
        waiting[position] = Waiting()
    for position in new:
        waiting[position] = Waiting(turns=3)
    others = [p for p in waiting if p not in needed]
    others.sort(key=lambda p: (-waiting[p].turns, -waiting[p].waited, p))
    chosen = sorted(others[: max(0, options.num_rows - len(needed))])
    for position in chosen:
        waiting[position] = Waiting(turns=max(0, waiting[position].turns - 1))
    return chosen, chosen + needed


# ---- elastic ---------------------------------------------------------------------------------


@dataclass
class LayerCache:
    """What one layer remembers of all T positions: its input, q and k after RoPE, v."""

    x: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def decode_elastic(model: OracleModel, state: State, options: Options) -> None:
    caches: list[LayerCache] = []
    tracked: list[int] = []
    new: list[int] = []
    while state.masked:
        margins = Margins()
        window = state.leftmost(options.window)
        if not state.steps:
            rows = list(range(len(state.ids)))
        else:
            ahead = window if options.block_caching else sorted(state.masked)
            rows = list(dict.fromkeys([*tracked, *new, *ahead]))
        hidden, step = elastic_forward(
            model, state, rows, tracked, window, caches, options, margins
        )
        logits = model.logits(hidden)
        tracked = step.tracked
        new = commit(model, state, window, logits, options, margins, options.tokens_per_step)
        drop_tail(model, state, new)
        record(state, step.first_full, new, tracked, rows, step.sims, margins)


@dataclass
class Pass:
    first_full: int
    tracked: list[int]
    sims: list[float]


def elastic_forward(
    model: OracleModel,
    state: State,
    rows: list[int],
    tracked: list[int],
    window: list[int],
    caches: list[LayerCache],
    options: Options,
    margins: Margins,
) -> tuple[torch.Tensor, Pass]:
    """One pass over the layers. Returns the last layer's output at the window and what was
    decided on the way."""
    everything = list(range(len(state.ids)))
    is_first_step = not state.steps
    first_full = -1 if is_first_step else model.num_layers
    chosen: set[int] = set()
    sims: list[float] = []
    x = model.embed(state.ids[rows])
    for layer in range(model.num_layers):
        if is_first_step:
            caches.append(LayerCache(*[torch.empty(0)] * 4))
        cache = caches[layer]
        if layer <= first_full:
            cache.x[rows] = x
            x = cache.x[rows].clone() if layer < first_full else cache.x.clone()
        else:
            cache.x = x.clone()
        is_full = layer >= first_full
        present = everything if is_full else rows
        q, k, v = model.qkv(layer, x, torch.tensor(present))
        if is_full:
            cache.q, cache.k, cache.v = q, k, v
            weights = model.weights(q, cache.k)
        else:
            old = model.weights(cache.q[tracked], cache.k)
            cache.q[rows], cache.k[rows], cache.v[rows] = q, k, v
            weights = model.weights(q, cache.k)
            if tracked:
                sim = similarity(old, weights[:, [rows.index(p) for p in tracked]])
                sims.append(sim)
                margins.narrow("drift", abs(sim - options.gamma))
                if sim < options.gamma:
                    first_full = layer + 1
        mass = weights[:, [present.index(p) for p in window]].sum((0, 1))
        chosen.update(most_attended(mass, state.masked, options.track_num, margins))
        x = model.finish_layer(layer, x, weights, cache.v)
    # When the last layer's test fails, first_full is num_layers but the present rows stay `rows`.
    return x[[present.index(p) for p in window]], Pass(first_full, sorted(chosen), sims)


def similarity(old: torch.Tensor, new: torch.Tensor) -> float:
    """Mean over (tracked token, key) of the cosine between H-vectors; both [H, tracked, T]."""
    return torch.nn.functional.cosine_similarity(old, new, dim=0).mean().item()


def most_attended(mass: torch.Tensor, masked: set[int], count: int, margins: Margins) -> list[int]:
    """The `count` keys of largest mass [T], masked ones counting as 0, lower position first."""
    values = [0.0 if i in masked else m for i, m in enumerate(mass.tolist())]
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    if count < len(order):
        last, refused = values[order[count - 1]], values[order[count]]
        margins.narrow("tracked", (last - refused) / max(1.0, last))
    return order[:count]
