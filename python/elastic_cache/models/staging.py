"""From checkpoint files to where the weights live, through a few small buffers.

What is held when, beside the weights themselves: the buffers, from the first piece to the last. A
piece is some rows of one tensor in the file's dtype. It is read by plain reads, so no page of a
file is ever mapped into the process and the size of a shard does not matter. To a GPU pieces are
read by several threads ahead of the copy, into page-locked buffers; one whose dtype or layout
differs from its destination's is held once more on the GPU while it is converted there. So a load
takes 2 MB beside the weights on the CPU; to a GPU, 32 MB of host memory and 8 MB of the GPU's.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

PIECE_BYTES = {"cpu": 2 * 2**20, "cuda": 8 * 2**20}
"""On the CPU a piece should be in the cache when it is copied, on a GPU outlast its launch."""

NUM_BUFFERS = {"cpu": 1, "cuda": 4}
"""Several are read at a time. On the CPU that gains nothing: the copy itself uses all cores."""

_BAND = 64  # rows of a transposing copy on the CPU, see _transpose


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of a file, and the rows that they become."""

    file: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype  # of the file
    destination: torch.Tensor


def split(
    file: Path, offset: int, dtype: torch.dtype, destination: torch.Tensor
) -> Iterator[Piece]:
    """A tensor that begins at `offset` of a file in pieces of whole rows.

    Args:
        destination: where it goes: any dtype, device and strides, in the shape that it has in the
            file, of one dimension or more. A row is what lies under one index of the first.
    """
    if not destination.numel():
        return
    row_bytes = destination[0].numel() * dtype.itemsize
    num_rows = max(1, PIECE_BYTES[destination.device.type] // row_bytes)
    if num_rows > _BAND:
        num_rows -= num_rows % _BAND
    for rows in destination.split(num_rows):
        num_bytes = len(rows) * row_bytes
        yield Piece(file, offset, num_bytes, dtype, rows)
        offset += num_bytes


def copy_pieces(pieces: Sequence[Piece], device: torch.device) -> None:
    """Reads pieces in order and copies each to its destination on `device`.

    Raises:
        OSError: a file cannot be read, or ends early; its `filename` says which.
    """
    size = max((piece.num_bytes for piece in pieces), default=0)
    buffers = [_Buffer(size, device) for _ in range(NUM_BUFFERS[device.type])]
    if len(buffers) == 1:
        for piece in pieces:
            buffers[0].read(piece)
            buffers[0].copy(piece)
    else:
        _copy_ahead(pieces, buffers)
    for buffer in buffers:
        buffer.wait()


def _copy_ahead(pieces: Sequence[Piece], buffers: Sequence[_Buffer]) -> None:
    """While one piece is copied, the next ones are read, a thread for each buffer."""
    with ThreadPoolExecutor(len(buffers)) as readers:
        rest = iter(pieces)
        reads = deque(
            (readers.submit(buffer.read, piece), buffer, piece)
            for buffer, piece in zip(buffers, rest)  # noqa: B905  whichever are fewer
        )
        while reads:
            read, buffer, piece = reads.popleft()
            read.result()
            buffer.copy(piece)
            following = next(rest, None)
            if following is not None:
                reads.append((readers.submit(buffer.read, following), buffer, following))


class _Buffer:
    """Host memory for one piece at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
        self._stream = torch.cuda.current_stream(device) if is_cuda else None
        self._copied: torch.cuda.Event | None = None

    def read(self, piece: Piece) -> None:
        self.wait()
        rest = self._bytes.numpy().data[: piece.num_bytes]
        try:
            with open(piece.file, "rb", buffering=0) as file:
                file.seek(piece.offset)
                while len(rest):
                    count = file.readinto(rest)
                    if not count:
                        raise OSError(errno.EIO, "the file ends early")
                    rest = rest[count:]
        except OSError as error:  # the name is not always in it
            raise OSError(error.errno, error.strerror, str(piece.file)) from error

    def copy(self, piece: Piece) -> None:
        """Copies what was read; on a GPU it only starts that, and `wait` says when it is done."""
        source = self._bytes[: piece.num_bytes].view(piece.dtype).view(piece.destination.shape)
        if self._stream is not None:
            # Not blocking also means that torch converts and transposes on the GPU.
            piece.destination.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(self._stream)
        elif source.dim() < 2 or piece.destination.stride(-1) == 1:
            piece.destination.copy_(source)
        else:
            _transpose(source, piece.destination)

    def wait(self) -> None:
        """Until the buffer may be written again."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def _transpose(source: torch.Tensor, destination: torch.Tensor) -> None:
    # A transposing copy of a large matrix misses the cache at every element; turning bands of 64
    # rows first (one cache line of the result) is 1.5 to 3 times as fast at 4096 x 4096.
    for wide, band in zip(destination.split(_BAND), source.split(_BAND), strict=True):
        wide.t().copy_(band.t().contiguous())
