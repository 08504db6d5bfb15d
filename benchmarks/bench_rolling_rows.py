"""rolling_rows of a step; plain torch sorts one sequence's positions by how due they are.

On a GPU plain torch waits for the host at every nonzero: this is what the op avoids.
"""

from __future__ import annotations

from dataclasses import astuple

from elastic_cache import ops
from elastic_cache.policies.rolling import RollingPolicy
from elastic_cache.reference import URGENT
from harness import Case, Data, num_bytes, run

RULE = RollingPolicy.rolling
SIZES = ((1, 350, 64), (1, 1024, 128), (1, 4096, 128), (8, 1024, 64))


def make_case(data: Data, num_sequences: int, capacity: int, num_rows: int) -> Case:
    masked = data.coin(num_sequences, capacity, chance=0.4)
    committed = data.coin(num_sequences, capacity, chance=4 / capacity) & ~masked
    due = (9000 * data.uniform(num_sequences, capacity)).int()
    chosen = data.int32([[0] * num_rows] * num_sequences)
    window, rows = (data.int32([count] * num_sequences) for count in (16, num_rows))
    key_range = data.int32([[0, capacity]] * num_sequences)
    position = data.int32(list(range(capacity)))

    def plain() -> None:
        for s in range(num_sequences):
            computed, waiting = committed[s].clone(), masked[s].nonzero().flatten()
            computed[waiting[:16]] = True
            due[s] += 1024 * RULE.reach // (RULE.reach + (position - waiting[0]).abs())
            ahead = waiting[16 : 16 + RULE.ahead]
            due[s, ahead] = due[s, ahead].clamp(min=URGENT)
            others = (~computed).nonzero().flatten()
            order = due[s, others].argsort(descending=True, stable=True)
            most_due = others[order[: num_rows - int(computed.sum())]].sort().values
            due[s, most_due] = (due[s, most_due] // URGENT - 1).clamp(min=0) * URGENT
            due[s, computed] = 0
            due[s, committed[s]] = RULE.repeats * URGENT

    return Case(
        f"{num_sequences} x {capacity} positions, {num_rows} rows",
        native=lambda: ops.rolling_rows(
            masked, committed, window, rows, key_range, *astuple(RULE), due, chosen
        ),
        plain=plain,
        num_bytes=num_bytes(masked, committed, due, due, chosen),
        plain_waits=True,
    )


if __name__ == "__main__":
    run("rolling_rows", lambda data: [make_case(data, *size) for size in SIZES])
