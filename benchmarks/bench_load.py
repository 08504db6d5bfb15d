"""Loads a random checkpoint of a given shape: seconds, and the memory it takes at its peak.

    python benchmarks/bench_load.py --shape llada-8b --folder /tmp/llada-8b [--json FILE]

The checkpoint (LLaDA's tensor names, bfloat16, shards of 4 GB) is written first if the folder does
not hold one. The load runs in a process of its own, after the GPU has been used once, so that what
CUDA itself takes is not counted as the load's. The files were just written: the operating system
may hand them out from memory, so the seconds are without a disk.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from elastic_cache.models import llada
from safetensors.torch import save_file
from shapes import SHAPES, random_model

SHARD_BYTES = 4 * 10**9


def write(folder: Path, shape: str, device: torch.device) -> None:
    """Writes the checkpoint shard by shard."""
    folder.mkdir(parents=True, exist_ok=True)
    model = random_model(shape, device, torch.bfloat16)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = number = 0

    def close() -> None:
        nonlocal size, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        size = 0

    for name, tensor in llada.named_tensors(model.config, model.weights):
        shard[name] = tensor.contiguous().cpu()
        size += tensor.numel() * tensor.element_size()
        if size > SHARD_BYTES:
            close()
    close()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llada", **llada.config_fields(model.config)}
    (folder / "config.json").write_text(json.dumps(config))


def peak_host_bytes() -> int:
    """Peak resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's peak memory")


def load_once(folder: str, device_name: str) -> dict[str, float]:
    """Loads in this process and says what it took."""
    import elastic_cache

    device = torch.device(device_name)
    torch.zeros(1, device=device)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, begin = peak_host_bytes(), time.perf_counter()
    engine = elastic_cache.load(folder, device=device_name, dtype="bfloat16")
    seconds = time.perf_counter() - begin
    is_cuda = device.type == "cuda"
    return {
        "seconds": seconds,
        "weight_bytes": engine.model.weights.num_bytes,
        "peak_host_growth_bytes": peak_host_bytes() - before,
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": torch.cuda.max_memory_reserved(device) if is_cuda else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llada-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_once(str(options.folder), options.device)))
        return
    if not (options.folder / "config.json").is_file():
        print(f"writing a random checkpoint to {options.folder}", flush=True)
        write(options.folder, options.shape, torch.device(options.device))
    command = [sys.executable, __file__, *sys.argv[1:], "--load"]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    size = result["weight_bytes"]
    print(
        f"{size / 1e9:.2f} GB in {result['seconds']:.1f} s ({size / 1e9 / result['seconds']:.2f} "
        f"GB/s); device memory {result['peak_device_bytes'] / size:.3f} x the weights; host memory "
        f"{result['peak_host_bytes'] / 1e9:.2f} GB at its peak, "
        f"{result['peak_host_growth_bytes'] / 1e9:.2f} GB of it by the load"
    )
    if options.json is not None:
        options.json.write_text(json.dumps({"command": " ".join(sys.argv), **result}) + "\n")


if __name__ == "__main__":
    main()
