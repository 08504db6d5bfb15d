"""Policies `prefix` and `dual`: Fast-dLLM (arXiv 2505.22618), ALGORITHM.md section 6.

The answer is cut into blocks. Each block begins with a full forward that fills the cache and
already commits; its further steps compute
    prefix: every position from the block's start to the end, against the cached prefix;
    dual:   the block's positions only, against everything else as cached.
Fast-dLLM has no EOS stop; these stop after the block in which EOS was committed.
"""

from __future__ import annotations

from dataclasses import dataclass

from elastic_cache.cache import CacheNeeds
from elastic_cache.config import GenerationConfig
from elastic_cache.plan import Plan, RollingRule


@dataclass(frozen=True)
class Block:
    """Positions start .. end - 1, of which num_masked are to be decoded."""

    start: int
    end: int
    num_masked: int


class BlockPolicy:
    """Block-wise decoding with a cached prefix, and for `dual` a cached suffix too."""

    needs = CacheNeeds(keys_values=True, queries=False, inputs=False)
    drops_tail_at_eos = False
    tests_drift = False
    window = lookahead = num_rows = steady_rows = 0
    rolling: RollingRule | None = None

    def __init__(self, masked: list[bool], settings: GenerationConfig, eos_id: int) -> None:
        self._is_dual = settings.policy == "dual"
        self._eos_id = eos_id
        self._length = len(masked)
        self.num_candidates = min(settings.block_length, len(masked))
        self._blocks = _blocks(masked, settings.block_length)
        self._per_step = _commits_per_step(settings.steps, self._blocks)
        self._block = 0
        self._step_in_block = 0
        self._num_left = self._blocks[0].num_masked if self._blocks else 0
        self._has_eos = False

    def plan(self, num_rows: int, num_candidates: int) -> Plan | None:
        if self._block == len(self._blocks):
            return None
        block = self._blocks[self._block]
        end = block.end if self._is_dual else self._length
        return Plan(
            is_full=self._step_in_block == 0,
            num_rows=end - block.start,
            num_candidates=block.end - block.start,
            listed=range(block.start, end),
            num_commits=self._num_commits(block),
        )

    def observe(self, tokens: list[int], num_masked: int) -> None:
        self._has_eos |= self._eos_id in tokens
        self._num_left -= len(tokens)
        self._step_in_block += 1
        if self._num_left > 0:
            return
        self._block = len(self._blocks) if self._has_eos else self._block + 1
        self._step_in_block = 0
        if self._block < len(self._blocks):
            self._num_left = self._blocks[self._block].num_masked

    def _num_commits(self, block: Block) -> int | None:
        """Commits of this step when `steps` fixes them: spread evenly, the remainder first."""
        if self._per_step is None:
            return None
        base, extra = divmod(block.num_masked, self._per_step)
        return base + (self._step_in_block < extra)


def _blocks(masked: list[bool], block_length: int) -> list[Block]:
    """Blocks from the first masked position to the end; blocks without a mask are left out."""
    if True not in masked:
        return []
    starts = range(masked.index(True), len(masked), block_length)
    ends = [min(start + block_length, len(masked)) for start in starts]
    blocks = [Block(a, b, sum(masked[a:b])) for a, b in zip(starts, ends, strict=True)]
    return [block for block in blocks if block.num_masked]


def _commits_per_step(steps: int | None, blocks: list[Block]) -> int | None:
    if steps is None:
        return None
    if not blocks or steps % len(blocks):
        raise ValueError(
            f"steps must be a multiple of the number of blocks ({len(blocks)}), got {steps}"
        )
    per_block = steps // len(blocks)
    fewest = min(block.num_masked for block in blocks)
    if per_block > fewest:
        raise ValueError(
            f"steps gives {per_block} steps to a block that has {fewest} masked positions: "
            f"at most {fewest * len(blocks)} steps are possible, got {steps}"
        )
    return per_block
