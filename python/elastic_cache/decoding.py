"""Hidden rows of the candidates -> the token each would commit and how sure the model is.

Logits are computed for the candidates only: over a whole sequence of LLaDA-8B they would be
gigabytes. With a temperature the token is drawn by the Gumbel-max trick (as LLaDA's reference
`generate` does, in float64), while the confidence stays the model's own probability of it.
"""

from __future__ import annotations

import torch

from elastic_cache import ops
from elastic_cache.config import GenerationConfig
from elastic_cache.models.weights import Model

RULE_THRESHOLD, RULE_TOP_K, RULE_FACTOR = range(3)


class Decoder:
    """Head and sampling.

    Args:
        model: its head [V, d] gives the logits.
        num_candidates: W, the most that are decoded at once.
        has_noise: whether requests sample (temperature above 0).
    """

    def __init__(self, model: Model, num_candidates: int, has_noise: bool) -> None:
        self._head = model.weights.head.t()
        self._temperature = 0.0
        self._noise: torch.Tensor | None = None
        if has_noise:
            shape, device = (num_candidates, self._head.shape[1]), model.device
            self._noise = torch.zeros(shape, dtype=torch.float64, device=device)
            self._generator = torch.Generator(device=device)

    def start(self, settings: GenerationConfig) -> None:
        """Takes over a request's temperature and seed."""
        self._temperature = settings.temperature
        if self._noise is None:
            return
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def draw(self, num_rows: int) -> None:
        """Draws the noise of a step. Not part of `decode`, which a captured graph repeats."""
        if self._noise is not None:
            noise = self._noise[:num_rows]
            torch.rand(noise.shape, out=noise, generator=self._generator)
            noise.log_().neg_().log_().mul_(-self._temperature)

    def decode(self, hidden: torch.Tensor, token: torch.Tensor, confidence: torch.Tensor) -> None:
        """hidden [W, d] in the model's dtype -> token int64 [W], confidence float64 [W]."""
        noise = None if self._noise is None else self._noise[: len(hidden)]
        ops.token_confidence(torch.mm(hidden, self._head), noise, token, confidence)


class CommitRule:
    """Which rule commits candidates, and its amount, where `ops.commit` reads them.

    Args:
        num_sequences, device: S and where the tensors live.
    """

    def __init__(self, num_sequences: int, device: torch.device) -> None:
        self.rule = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        self.amount = torch.zeros(num_sequences, dtype=torch.float64, device=device)

    def start(self, settings: GenerationConfig) -> None:
        """`tokens_per_step` (top-k), `factor`, or else `threshold`."""
        rule, amount = RULE_THRESHOLD, settings.threshold
        if settings.tokens_per_step is not None:
            rule, amount = RULE_TOP_K, float(settings.tokens_per_step)
        elif settings.steps is not None:
            rule, amount = RULE_TOP_K, 1.0
        elif settings.factor is not None:
            rule, amount = RULE_FACTOR, settings.factor
        self.rule.fill_(rule)
        self.amount.fill_(amount)

    def fix(self, num_commits: int) -> None:
        """Sets the number of commits of the next step."""
        self.amount.fill_(num_commits)
