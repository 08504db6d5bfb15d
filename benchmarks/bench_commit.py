"""commit of a step's window by threshold; plain torch is the same rule with indexing.

A commit uses up its candidates, so each arm first puts back tokens and masks (two small copies).
"""

from __future__ import annotations

import torch
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((1, 350, 16), (1, 4096, 64), (8, 1024, 32))
EOS, MASK = 2, 5


def make_case(data: Data, num_sequences: int, capacity: int, window: int) -> Case:
    masked_before = data.coin(num_sequences, capacity, chance=0.9)
    tokens_before = torch.where(masked_before, MASK, 11)
    masked, tokens, committed = masked_before.clone(), tokens_before.clone(), masked_before.clone()
    found = [masked_before[s].nonzero().flatten()[:window] for s in range(num_sequences)]
    slots = torch.cat([s * capacity + positions for s, positions in enumerate(found)])
    candidates = slots.int()
    confidence = data.uniform(len(slots), dtype=torch.float64)
    token = (100 * data.uniform(len(slots))).long()
    rule, eos_position = data.int32([0] * num_sequences), data.int32([-1] * num_sequences)
    amount = torch.full((num_sequences,), 0.9, dtype=torch.float64, device=data.device)
    key_range = data.int32([[0, capacity]] * num_sequences)
    status = data.int32([[0] * 4] * num_sequences)

    def native() -> None:
        masked.copy_(masked_before)
        tokens.copy_(tokens_before)
        ops.commit(
            token, confidence, candidates, rule, amount, key_range, EOS, None, 1,
            tokens, masked, committed, eos_position, status,
        )  # fmt: skip

    def plain() -> None:
        masked.copy_(masked_before)
        tokens.copy_(tokens_before)
        committed.zero_()
        for s, part in enumerate(confidence.view(num_sequences, -1)):
            begin = s * part.numel()
            chosen = begin + (part >= part.max().clamp(max=0.9)).nonzero().flatten()
            tokens.flatten()[slots[chosen]] = token[chosen]
            committed.flatten()[slots[chosen]] = True
        masked.logical_and_(~committed)
        masked.sum(1)

    return Case(
        f"{num_sequences} x {capacity} positions, {window} candidates",
        native=native,
        plain=plain,
        num_bytes=num_bytes(token, confidence, candidates, tokens, masked, committed),
        plain_waits=True,
    )


if __name__ == "__main__":
    run("commit", lambda data: [make_case(data, *size) for size in SIZES])
