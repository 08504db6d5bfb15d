"""What does not fit is refused before it is allocated, with numbers and a remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from elastic_cache.cache import Cache, CacheNeeds
from elastic_cache.config import ModelConfig
from elastic_cache.memory import check_memory, shortage
from elastic_cache.models import llada, load_model
from elastic_cache.models.checkpoint import read_json

GB = 10**9
CPU, META, GPU = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)


def test_what_fits() -> None:
    assert shortage("cuda:0", 5 * GB, 5 * GB, 80 * GB, "the weights") is None
    assert shortage("cuda:0", 0, 0, 80 * GB, "the weights") is None


def test_what_does_not_fit_now() -> None:
    assert shortage("cuda:1", 5 * GB + 1, 5 * GB, 80 * GB, "the caches", "ask for less") == (
        "the caches need 5.00 GB on cuda:1, where 5.00 GB of 80.00 GB are free: ask for less, or "
        "end other programs that use cuda:1"
    )


def test_what_never_fits() -> None:
    assert shortage("cuda:0", 32 * GB, 23 * GB, 24 * GB, "the weights") == (
        "the weights need 32.00 GB on cuda:0, where 23.00 GB of 24.00 GB are free: take a GPU with "
        "more memory"
    )


def lend(monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, allocated: int) -> None:
    """A GPU of 80 GB as torch would tell of it."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)


def test_what_torch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    lend(monkeypatch, 2 * GB, 30 * GB, 27 * GB)
    check_memory(GPU, 5 * GB, "the caches")
    with pytest.raises(ValueError, match="need 5.50 GB on cuda:0, where 5.00 GB of 80.00 GB"):
        check_memory(GPU, 5 * GB + GB // 2, "the caches")


def test_the_cpu_is_not_asked() -> None:
    check_memory(CPU, 10**18, "the weights")


def test_weights_are_refused_before_they_are_allocated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here there is no GPU to allocate on: anything but the check would say so."""
    folder = write_checkpoint(tmp_path)
    lend(monkeypatch, 1000, 0, 0)
    with pytest.raises(ValueError, match="^the weights need 0.00 GB on cuda:0, where 0.00 GB of"):
        load_model(str(folder), GPU, torch.bfloat16)
    with pytest.raises(ValueError, match="are free: use dtype='bfloat16', or end other programs"):
        load_model(str(folder), GPU, torch.float32)


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_known_without_allocating(tmp_path: Path, tied: bool) -> None:
    folder = write_checkpoint(tmp_path, tied=tied, include_qkv_bias=True)
    model = load_model(str(folder), CPU, torch.bfloat16)
    rope = 4 * model.config.max_length * model.config.head_dim
    assert model.weights.num_bytes == 2 * model.config.num_parameters + rope


def test_the_size_of_a_cache_is_known_without_allocating() -> None:
    path = Path(llada.__file__).parents[1] / "data/tiny-llada/config.json"
    config: ModelConfig = llada.read_config(read_json(path), path)
    needs = CacheNeeds(keys_values=True, queries=False, inputs=True)
    sizes = {Cache(config, 2, 50, needs, d, torch.bfloat16).num_bytes for d in (CPU, META)}
    keys, depth = config.num_kv_heads * config.head_dim, config.num_layers
    queries = config.num_heads * config.head_dim
    assert sizes == {2 * 100 * (depth * (2 * keys + config.hidden_size) + queries)}
