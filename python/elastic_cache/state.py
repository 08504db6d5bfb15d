"""The tokens of the sequences being decoded and what is known about each position.

Everything lives on the device, so that ops decide without asking the host. Only the engine's
commit changes `tokens`, `masked`, `committed` and `eos_position`; only the drift decision
changes `tracked`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

NUM_STATUS = 4
STATUS_COMMITTED, STATUS_MASKED, STATUS_EOS_POSITION, STATUS_NOT_FINITE = range(NUM_STATUS)


@dataclass(frozen=True)
class DecodeState:
    """S sequences of C positions; L layers; k tracked tokens per layer."""

    tokens: torch.Tensor  # int64 [S, C]
    masked: torch.Tensor  # bool [S, C] still to be decoded; a state of its own, not token == mask
    committed: torch.Tensor  # bool [S, C] committed in the previous step
    tracked: torch.Tensor  # int32 [L, S, k] positions chosen in the previous step, -1 = none
    key_range: torch.Tensor  # int32 [S, 2] first and one-past-last position
    eos_position: torch.Tensor  # int32 [S] the EOS that cut the tail, -1 before that
    status: torch.Tensor  # int32 [S, 4] what the last commit reports

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_sequences(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def start(
        cls, ids: torch.Tensor, masked: torch.Tensor, num_layers: int, track_num: int
    ) -> DecodeState:
        """State before step 0 of one sequence; ids int64 [T] and masked bool [T] on the device."""
        device, length = ids.device, ids.numel()
        return cls(
            tokens=ids.clone().view(1, length),
            masked=masked.clone().view(1, length),
            committed=torch.zeros(1, length, dtype=torch.bool, device=device),
            tracked=torch.full((num_layers, 1, track_num), -1, dtype=torch.int32, device=device),
            key_range=torch.tensor([[0, length]], dtype=torch.int32, device=device),
            eos_position=torch.full((1,), -1, dtype=torch.int32, device=device),
            status=torch.zeros(1, NUM_STATUS, dtype=torch.int32, device=device),
        )
