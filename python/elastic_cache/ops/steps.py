"""How a step begins and ends: row lists, confidences, the commit. What the letters mean: `ops`."""

from __future__ import annotations

from torch import Tensor

from elastic_cache.native import kernel

_rolling_rows = kernel("rolling_rows")
_select_rows = kernel("select_rows")
_refresh_rows = kernel("refresh_rows")
_token_confidence = kernel("token_confidence")
_commit = kernel("commit")


def select_rows(
    masked: Tensor,
    committed: Tensor,
    tracked: Tensor,
    window: Tensor,
    lookahead: Tensor,
    rows: Tensor,
    segments: Tensor,
    window_rows: Tensor,
) -> None:
    """The rows a step computes: tracked, newly committed, window, lookahead, in this order.

    The window is the leftmost `window` positions still masked, lookahead the next ones: computed,
    but not decoded. A position is listed once, under the first kind that claims it; tracked and
    committed rows are in ascending order. A sequence whose window is empty is finished and has no
    rows.

    Args:
        masked: bool [S, C], positions still masked.
        committed: bool [S, C], positions committed in the previous step.
        tracked: int32 [L, S, k], positions every layer chose in the previous step, -1 = none.
        window: int32 [S], how many masked positions each sequence decodes at once.
        lookahead: int32 [S].
        rows: out, int32 [max_rows], padded with -1.
        segments: out, int32 [S, 5].
        window_rows: out, int32 [max_window], indices into `rows` of the window rows, padded
            with -1.

    Raises:
        ValueError: a wrong argument, or `rows` or `window_rows` is too short.

    Source: the rows of a step in the paper's code; lookahead is an addition.
    """
    _select_rows(masked, committed, tracked, window, lookahead, rows, segments, window_rows)


def rolling_rows(
    masked: Tensor,
    committed: Tensor,
    window: Tensor,
    num_rows: Tensor,
    key_range: Tensor,
    ahead: int,
    repeats: int,
    reach: int,
    due: Tensor,
    chosen: Tensor,
) -> None:
    """The cached positions that the next step computes anew: those most due.

    As many as `num_rows` leaves beside the newly committed positions and the window; of equally
    due ones the lower position. They may be given to `select_rows` as tracked positions of one
    layer. A position that is not computed becomes due by `1024 * reach // (reach + distance)` a
    step, its distance being that from the leftmost masked position. 2**20 and more is urgent.

    Args:
        masked: bool [S, C], positions still masked.
        committed: bool [S, C], positions committed in the previous step.
        window: int32 [S], how many masked positions each sequence decodes at once.
        num_rows: int32 [S], rows of the step in all.
        key_range: int32 [S, 2]; positions outside of it are not looked at.
        ahead: so many masked positions behind the window are urgent.
        repeats: a newly committed position is urgent for so many steps after the coming one, 0 to
            1024.
        reach: positions at this distance become due half as fast as those beside the window, 1 to
            2**20.
        due: in and out, int32 [S, C], not negative. The coming step counts as done: what it
            computes is at 0 again, or at 2**20 times the steps for which it stays urgent.
        chosen: out, int32 [S, k], positions in ascending order, padded with -1; at most k.

    Raises:
        ValueError: a wrong argument.

    Source: docs/results.md; Flash-dLLM (arXiv 2609.26796) refreshes a fixed number of rows a step,
        too.
    """
    _rolling_rows(
        masked, committed, window, num_rows, key_range, ahead, repeats, reach, due, chosen
    )


def refresh_rows(
    first_full_layer: Tensor,
    key_range: Tensor,
    layer: int,
    capacity: int,
    rows: Tensor,
    offsets: Tensor,
) -> None:
    """The rows that run in full mode at `layer`: all positions in the key range of every sequence
    whose `first_full_layer` is at most `layer`.

    Args:
        first_full_layer: int32 [S].
        key_range: int32 [S, 2].
        layer: index of the layer.
        capacity: C.
        rows: out, int32 [max_rows], padded with -1.
        offsets: out, int32 [S + 1]; sequence s owns rows offsets[s] .. offsets[s + 1] - 1.

    Raises:
        ValueError: a wrong argument, or `rows` is too short.

    Source: the paper's depth-selective refresh.
    """
    _refresh_rows(first_full_layer, key_range, layer, capacity, rows, offsets)


def token_confidence(
    logits: Tensor, noise: Tensor | None, token: Tensor, confidence: Tensor
) -> None:
    """The token of every row of logits and the model's probability of it.

    token = argmax(logits + noise), ties to the lowest id; confidence = softmax(logits)[token],
    summed in double. A row with NaN or +infinity gets token 0 and confidence NaN, and is never
    committed.

    Args:
        logits: model [W, V]; rows may be any distance apart.
        noise: float64 [W, V], or None for greedy decoding.
        token: out, int64 [W].
        confidence: out, float64 [W].

    Raises:
        ValueError: a wrong argument.

    Source: LLaDA's low-confidence decoding (arXiv 2502.09992).
    """
    _token_confidence(logits, noise, token, confidence)


def commit(
    token: Tensor,
    confidence: Tensor,
    candidates: Tensor,
    rule: Tensor,
    amount: Tensor,
    key_range: Tensor,
    eos_id: int,
    first_full_layer: Tensor | None,
    num_layers: int,
    tokens: Tensor,
    masked: Tensor,
    committed: Tensor,
    eos_position: Tensor,
    status: Tensor,
) -> None:
    """Commit candidates by confidence, cut the tail after the first EOS, report to the host.

    Rules per sequence: 0 threshold (amount eps: confidence >= min(eps, best)), 1 top k (amount
    k), 2 factor (the r-th best while confidence >= 1 - amount / (r + 1), the best always).
    Candidates that are -1 or no longer masked are ignored; a NaN confidence stops the whole
    sequence from committing.

    Args:
        token: int64 [W].
        confidence: float64 [W].
        candidates: int32 [W], slots, -1 = skip.
        rule: int32 [S].
        amount: float64 [S].
        key_range: int32 [S, 2]; positions outside of it are never touched.
        eos_id: token id that ends the answer, -1 = none does.
        first_full_layer: int32 [S]; a sequence below `num_layers` is left as it is, because its
            drift test failed. None: every sequence commits.
        num_layers: of the model.
        tokens: in and out, int64 [S, C].
        masked: in and out, bool [S, C].
        committed: out, bool [S, C], exactly the positions committed by this call.
        eos_position: in and out, int32 [S], -1 before the tail was cut.
        status: out, int32 [S, 4]: positions committed, positions still masked, EOS position,
            candidates whose confidence was NaN.

    Raises:
        ValueError: a wrong argument.

    Source: the paper's code (threshold, top k, EOS); Fast-dLLM (factor).
    """
    _commit(
        token,
        confidence,
        candidates,
        rule,
        amount,
        key_range,
        eos_id,
        first_full_layer,
        num_layers,
        tokens,
        masked,
        committed,
        eos_position,
        status,
    )
