"""Checkpoint files: where a name leads, JSON with clear errors, tensors out of safetensors.

The subtle thing is memory: headers of all shards are checked before anything is allocated, then
the tensors go to their final places shard by shard, through the small buffers of staging.py, so a
load holds hardly more than the weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from elastic_cache.models import staging

EMBEDDED = {"tiny": Path(__file__).parent.parent / "data" / "tiny-llada"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the sentence names the file, the tensor or field, and why."""


def find_checkpoint(name_or_path: str) -> Path:
    """The folder of a checkpoint: an embedded name, an existing folder, or a hub id."""
    if name_or_path in EMBEDDED:
        return EMBEDDED[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"model must be a folder with config.json and safetensors files, got the file {path}"
        )
    if not _HUB_ID.fullmatch(name_or_path):
        raise CheckpointError(
            f"model {name_or_path!r} is no existing folder, no embedded model "
            f"({', '.join(EMBEDDED)}) and no hub id of the form owner/name"
        )
    return _download(name_or_path)


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"model {hub_id!r} is no existing folder, and downloading it needs huggingface_hub: "
            "run pip install huggingface_hub, or give the path of a folder"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub client raises its own, the HTTP library's and OS errors
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise CheckpointError(
            f"model {hub_id!r} is no existing folder and could not be downloaded "
            f"({type(error).__name__}: {reason}): check the name and the network, or download "
            "the checkpoint elsewhere and give the path of its folder"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


@dataclass(frozen=True)
class TensorHeader:
    """What a shard's header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, ...
    offset: int  # of the first byte in the file


class TensorFiles:
    """The tensors of a checkpoint folder: headers read at once, data only by `copy_to`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headers: dict[str, TensorHeader] = {}
        weights, index = folder / _WEIGHTS, folder / _INDEX
        if weights.is_file():
            self.headers = _read_headers(weights)
        elif index.is_file():
            self._read_sharded(index)
        else:
            raise CheckpointError(
                f"{folder} has neither {_WEIGHTS} nor {_INDEX}: only safetensors weights are read"
            )

    def _read_sharded(self, index: Path) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map from tensor names to files")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise CheckpointError(
                    f"{index}: weight_map must name files of its own folder, got {shard!r}"
                )
        for shard in dict.fromkeys(weight_map.values()):
            if not (self.folder / shard).is_file():
                raise CheckpointError(f"{self.folder / shard} does not exist, but {index} names it")
            headers = _read_headers(self.folder / shard)
            for name in headers:
                if weight_map.get(name) != shard:
                    raise CheckpointError(
                        f"{self.folder / shard} holds tensor {name}, which {index} does not "
                        f"place there"
                    )
            self.headers.update(headers)
        for name, shard in weight_map.items():
            if name not in self.headers:
                raise CheckpointError(
                    f"{index} places tensor {name} in {shard}, which does not hold it"
                )

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuses a tensor that is missing, of another shape, or not of a floating-point dtype."""
        header = self.headers.get(name)
        if header is None:
            raise CheckpointError(
                f"{self.folder} lacks tensor {name} of shape {list(shape)}, which its config asks "
                "for"
            )
        if header.shape != shape:
            raise CheckpointError(
                f"{header.file}: tensor {name} must be {list(shape)} by the config, got "
                f"{list(header.shape)}"
            )
        if header.dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{header.file}: tensor {name} must have one of the dtypes "
                f"{', '.join(_FLOAT_DTYPES)}, got {header.dtype}"
            )

    def copy_to(self, destinations: Mapping[str, torch.Tensor], device: torch.device) -> None:
        """Copies checked tensors into their destinations on `device` (any dtype and strides)."""
        headers = {name: self.headers[name] for name in destinations}
        # In the order of the files, so that the disk reads forward.
        order = sorted(headers, key=lambda name: (headers[name].file, headers[name].offset))
        pieces = [
            piece
            for name in order
            for piece in staging.split(
                headers[name].file,
                headers[name].offset,
                _FLOAT_DTYPES[headers[name].dtype],
                destinations[name],
            )
        ]
        try:
            staging.copy_pieces(pieces, device)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename} could not be read: {error.strerror}"
            ) from error


def _read_headers(file: Path) -> dict[str, TensorHeader]:
    try:
        with safe_open(file, framework="pt", device="cpu"):
            pass  # it refuses what is damaged; the places of the tensors it does not tell
        with file.open("rb") as shard:
            length = int.from_bytes(shard.read(8), "little")
            entries = json.loads(shard.read(length))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is truncated or no safetensors file: {error}") from error
    return {
        name: TensorHeader(
            file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0]
        )
        for name, entry in entries.items()
        if name != "__metadata__"
    }
