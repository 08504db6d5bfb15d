"""rolling_rows of a step; plain torch sorts one sequence's ages.

On a GPU plain torch waits for the host at every nonzero: this is what the op avoids.
"""

from __future__ import annotations

from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((1, 350, 64), (1, 1024, 128), (1, 4096, 128), (8, 1024, 64))


def make_case(data: Data, num_sequences: int, capacity: int, num_rows: int) -> Case:
    masked = data.coin(num_sequences, capacity, chance=0.4)
    committed = data.coin(num_sequences, capacity, chance=4 / capacity) & ~masked
    age = (9 * data.uniform(num_sequences, capacity)).int()
    chosen = data.int32([[0] * num_rows] * num_sequences)
    window, rows = (data.int32([count] * num_sequences) for count in (16, num_rows))
    key_range = data.int32([[0, capacity]] * num_sequences)

    def plain() -> None:
        for s in range(num_sequences):
            computed = committed[s].clone()
            computed[masked[s].nonzero().flatten()[:16]] = True
            others = (~computed).nonzero().flatten()
            order = age[s, others].argsort(descending=True, stable=True)
            oldest = others[order[: num_rows - int(computed.sum())]].sort().values
            age[s] += 1
            age[s, computed] = 0
            age[s, oldest] = 0

    return Case(
        f"{num_sequences} x {capacity} positions, {num_rows} rows",
        native=lambda: ops.rolling_rows(masked, committed, window, rows, key_range, age, chosen),
        plain=plain,
        num_bytes=num_bytes(masked, committed, age, age, chosen),
        plain_waits=True,
    )


if __name__ == "__main__":
    run("rolling_rows", lambda data: [make_case(data, *size) for size in SIZES])
