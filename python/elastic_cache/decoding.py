"""Hidden rows of the candidates -> the token each would commit and how sure the model is.

Logits are computed for the candidates only: over a whole sequence of LLaDA-8B they would be
gigabytes. With a temperature the token is drawn by the Gumbel-max trick (as LLaDA's reference
`generate` does, in float64), while the confidence stays the model's own probability of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from elastic_cache import ops
from elastic_cache.config import GenerationConfig
from elastic_cache.models.weights import Model

RULE_THRESHOLD, RULE_TOP_K, RULE_FACTOR = range(3)


class Decoder:
    """Head and sampling.

    Args:
        model: its head [V, d] gives the logits.
        num_sequences: S.
        num_candidates: W, the most that are decoded at once, of a sequence.
        has_noise: whether any request samples (temperature above 0).
        batch_invariant: on a GPU no bit of a row's logits depends on the rows beside it.
    """

    def __init__(
        self,
        model: Model,
        num_sequences: int,
        num_candidates: int,
        has_noise: bool,
        batch_invariant: bool,
    ) -> None:
        self._head = model.weights.head.t()
        self._has_own_product = batch_invariant and model.device.type == "cuda"
        self._temperatures = [0.0] * num_sequences
        self._drawn = self._gathered = None
        if has_noise:
            shape, device = (num_sequences, num_candidates, self._head.shape[1]), model.device
            self._drawn = torch.zeros(shape, dtype=torch.float64, device=device)
            # Of a single sequence it is together already.
            self._gathered = self._drawn[0]
            if num_sequences > 1:
                self._gathered = torch.zeros_like(self._drawn).flatten(0, 1)
            self._generators = [torch.Generator(device=device) for _ in range(num_sequences)]

    def start(self, sequence: int, settings: GenerationConfig) -> None:
        """Takes over a request's temperature and seed."""
        self._temperatures[sequence] = settings.temperature
        if self._drawn is None:
            return
        self._drawn[sequence].zero_()
        if settings.seed is None:
            self._generators[sequence].seed()
        else:
            self._generators[sequence].manual_seed(settings.seed)

    def samples(self, sequences: Iterable[int]) -> bool:
        """Whether one of these draws its tokens."""
        return self._drawn is not None and any(self._temperatures[s] > 0 for s in sequences)

    def draw(self, sequence: int, num_rows: int) -> None:
        """Draws the noise of a step. Not part of `decode`, which a captured graph repeats."""
        temperature = self._temperatures[sequence]
        if self._drawn is None or temperature == 0:
            return
        noise = self._drawn[sequence, :num_rows]
        torch.rand(noise.shape, out=noise, generator=self._generators[sequence])
        noise.log_().neg_().log_().mul_(-temperature)

    def gather(self, sizes: Sequence[int]) -> None:
        """Puts the first rows of every sequence's noise together, so many of each."""
        if self._drawn is None or self._gathered is None or len(sizes) == 1:
            return
        begin = 0
        for sequence, size in enumerate(sizes):
            self._gathered[begin : begin + size].copy_(self._drawn[sequence, :size])
            begin += size

    def noise(self, sequence: int | None, num_rows: int) -> torch.Tensor | None:
        """Rows of what was drawn for a sequence, or of all that was gathered."""
        if self._drawn is None or self._gathered is None:
            return None
        return (self._gathered if sequence is None else self._drawn[sequence])[:num_rows]

    def decode(
        self,
        hidden: torch.Tensor,
        noise: torch.Tensor | None,
        parts: Sequence[int],
        token: torch.Tensor,
        confidence: torch.Tensor,
    ) -> None:
        """hidden [W, d] in the model's dtype -> token int64 [W], confidence float64 [W].

        `parts`, which add up to W, are products of their own: in the vendor's a row's sums may
        depend on how many rows there are, and nobody's tokens shall depend on the others'.
        """
        if self._has_own_product:
            logits = hidden.new_empty(len(hidden), self._head.shape[1])
            ops.linear(hidden, self._head, None, logits, True)
        elif len(parts) == 1:
            logits = torch.mm(hidden, self._head)
        else:
            logits = torch.cat([torch.mm(part, self._head) for part in hidden.split(list(parts))])
        ops.token_confidence(logits, noise, token, confidence)


class CommitRule:
    """Which rule commits candidates, and its amount, where `ops.commit` reads them.

    Args:
        num_sequences, device: S and where the tensors live.
    """

    def __init__(self, num_sequences: int, device: torch.device) -> None:
        self.rule = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self.amount = torch.zeros(num_sequences, dtype=torch.float64, device=device)

    def start(self, sequence: int, settings: GenerationConfig) -> None:
        """`tokens_per_step` (top-k), `factor`, or else `threshold`."""
        rule, amount = RULE_THRESHOLD, settings.threshold
        if settings.tokens_per_step is not None:
            rule, amount = RULE_TOP_K, float(settings.tokens_per_step)
        elif settings.steps is not None:
            rule, amount = RULE_TOP_K, 1.0
        elif settings.factor is not None:
            rule, amount = RULE_FACTOR, settings.factor
        self.rule[sequence].fill_(rule)
        self.amount[sequence].fill_(amount)

    def fix(self, sequence: int, num_commits: int) -> None:
        """Sets the number of commits of the next step."""
        self.amount[sequence].fill_(num_commits)
