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
from elastic_cache.plan import Plan

RULE_THRESHOLD, RULE_TOP_K, RULE_FACTOR = range(3)


class Decoder:
    """Head and sampling of one request.

    Args:
        model: its head [V, d] gives the logits.
        settings: temperature and seed.
    """

    def __init__(self, model: Model, settings: GenerationConfig) -> None:
        self._head = model.weights.head.t()
        self._temperature = settings.temperature
        self._generator: torch.Generator | None = None
        if settings.temperature > 0:
            self._generator = torch.Generator(device=model.device)
            if settings.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(settings.seed)

    def decode(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [W, d] in the model's dtype -> token int64 [W], confidence float64 [W]."""
        logits = torch.mm(hidden, self._head)
        token = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        confidence = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
        ops.token_confidence(logits, self._noise(logits), token, confidence)
        return token, confidence

    def _noise(self, logits: torch.Tensor) -> torch.Tensor | None:
        if self._generator is None:
            return None
        uniform = torch.rand(
            logits.shape, dtype=torch.float64, device=logits.device, generator=self._generator
        )
        return uniform.log_().neg_().log_().mul_(-self._temperature)


class CommitRule:
    """Which rule commits candidates, and its amount, where `ops.commit` reads them.

    Args:
        settings: `tokens_per_step` (top-k), `factor`, or else `threshold`.
        num_sequences, device: S and where the tensors live.
    """

    def __init__(
        self, settings: GenerationConfig, num_sequences: int, device: torch.device
    ) -> None:
        rule, amount = RULE_THRESHOLD, settings.threshold
        if settings.tokens_per_step is not None:
            rule, amount = RULE_TOP_K, float(settings.tokens_per_step)
        elif settings.steps is not None:
            rule, amount = RULE_TOP_K, 1.0
        elif settings.factor is not None:
            rule, amount = RULE_FACTOR, settings.factor
        self.rule = torch.full((num_sequences,), rule, dtype=torch.int32, device=device)
        self.amount = torch.full((num_sequences,), amount, dtype=torch.float64, device=device)

    def prepare(self, plan: Plan) -> None:
        """Takes over the number of commits where the plan fixes it."""
        if plan.num_commits is not None:
            self.amount.fill_(plan.num_commits)
