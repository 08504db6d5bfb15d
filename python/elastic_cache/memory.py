"""Whether something fits into a GPU's memory, said before anything is allocated."""

from __future__ import annotations

import torch

SCRATCH_BYTES = 256 * 2**20
"""What a GPU needs for a request beside its caches and buffers: two workspaces of 32 MiB of the
vendor's products, their code, captured steps, and what the allocator rounds up. [225 MiB for the
first request of a process, 101 MiB for one with LLaDA-8B after that; an H100, torch 2.11]"""


def check_memory(device: torch.device, num_bytes: int, what: str, advice: str = "") -> None:
    """Refuses an allocation that a GPU has no room for; on the CPU it does nothing.

    Sizes are best taken from the thing itself on torch's meta device, which allocates nothing:
    `Cache(..., device=torch.device("meta"), ...).num_bytes`.

    Args:
        num_bytes: what will be allocated.
        what: its name as the subject of a sentence, in the plural ("the weights").
        advice: what makes it smaller, if anything does ("use dtype='bfloat16'").

    Raises:
        ValueError: a sentence with the bytes needed, the bytes free, and what to do.
    """
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    # Torch keeps what was freed and hands it out again.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    problem = shortage(str(device), num_bytes, free + unused, total, what, advice)
    if problem is not None:
        raise ValueError(problem)


def shortage(
    device: str, needed: int, free: int, total: int, what: str, advice: str = ""
) -> str | None:
    """The sentence of `check_memory`; None if `needed` bytes fit into the `free` ones."""
    if needed <= free:
        return None
    if needed <= total:
        remedy = f"end other programs that use {device}"
    else:
        remedy = "take a GPU with more memory"
    return (
        f"{what} need {_gigabytes(needed)} on {device}, where {_gigabytes(free)} of "
        f"{_gigabytes(total)} are free: {advice + ', or ' if advice else ''}{remedy}"
    )


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
