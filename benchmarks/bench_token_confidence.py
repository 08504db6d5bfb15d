"""token_confidence of a window over the vocabularies of the embedded model and of LLaDA-8B."""

from __future__ import annotations

import torch
from elastic_cache import ops
from harness import Case, Data, num_bytes, run

SIZES = ((16, 768), (16, 32000), (16, 126464), (64, 126464))


def make_case(data: Data, num_rows: int, vocab_size: int) -> Case:
    logits = data.normal(num_rows, vocab_size)
    token = torch.ones(num_rows, dtype=torch.int64, device=data.device)
    confidence = data.uniform(num_rows, dtype=torch.float64)

    def plain() -> None:
        torch.softmax(logits, dim=-1, dtype=torch.float64).max(-1)

    return Case(
        f"{num_rows} rows, {vocab_size} tokens",
        native=lambda: ops.token_confidence(logits, None, token, confidence),
        plain=plain,
        num_bytes=num_bytes(logits, token, confidence),
    )


if __name__ == "__main__":
    run("token_confidence", lambda data: [make_case(data, *size) for size in SIZES])
