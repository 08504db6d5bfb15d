"""Loading weights: what is read is exactly what was written, where it should lie, in its dtype."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import random_tensors, save_tensors, write_checkpoint
from elastic_cache.device import survey, why_unusable
from elastic_cache.models import CheckpointError, Model, llada, load_model, staging
from elastic_cache.models.checkpoint import TensorFiles

CPU = torch.device("cpu")
SIZES = {"d": 24, "kv": 12, "ffn": 20, "vocab": 33}
SHAPE = dict(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, ffn=20, vocab=33)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(str(folder), CPU, dtype)


def layer_parts(tensors: dict[str, torch.Tensor], layer: int, names: list[str]) -> torch.Tensor:
    prefix = f"model.transformer.blocks.{layer}."
    return torch.cat([tensors[prefix + name] for name in names])


@pytest.mark.parametrize("scheme", ["llada", "hf"])
@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_every_tensor_lands_in_its_place(
    tmp_path: Path, scheme: str, shards: int, tied: bool
) -> None:
    folder = write_checkpoint(tmp_path, **SHAPE, scheme=scheme, shards=shards, tied=tied, seed=3)
    model = load(folder)
    written = random_tensors(SIZES, 3, "llada", tied, False, seed=3)
    assert torch.equal(model.weights.embedding, written["model.transformer.wte.weight"])
    assert torch.equal(model.weights.final_norm, written["model.transformer.ln_f.weight"])
    head = "model.transformer.wte.weight" if tied else "model.transformer.ff_out.weight"
    assert torch.equal(model.weights.head, written[head])
    for i, layer in enumerate(model.weights.layers):
        parts = {
            "attention_norm": ["attn_norm.weight"],
            "qkv": ["q_proj.weight", "k_proj.weight", "v_proj.weight"],
            "attention_out": ["attn_out.weight"],
            "mlp_norm": ["ff_norm.weight"],
            "gate_up": ["ff_proj.weight", "up_proj.weight"],
            "down": ["ff_out.weight"],
        }
        for field, names in parts.items():
            assert torch.equal(getattr(layer, field), layer_parts(written, i, names)), (i, field)
        assert layer.qkv_bias is None


def test_matrices_lie_transposed_and_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    untied = load(write_checkpoint(tmp_path / "untied", **SHAPE)).weights
    for layer in untied.layers:
        for matrix in (layer.qkv, layer.attention_out, layer.gate_up, layer.down):
            assert matrix.t().is_contiguous()
    assert untied.head.t().is_contiguous()
    assert untied.embedding.is_contiguous()
    tied = load(write_checkpoint(tmp_path / "tied", **SHAPE, tied=True)).weights
    assert tied.head.data_ptr() == tied.embedding.data_ptr()


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_dtype_is_converted_once(tmp_path: Path, source: torch.dtype, target: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, **SHAPE, dtype=source, seed=5)
    weights = load(folder, target).weights
    name = "model.transformer.blocks.1.ff_out.weight"
    written = random_tensors(SIZES, 3, "llada", False, False, seed=5)[name].to(source)
    assert weights.layers[1].down.dtype == target
    assert torch.equal(weights.layers[1].down, written.to(target))
    assert weights.rope.dtype == torch.float32


def test_matrices_larger_than_a_copy_band(tmp_path: Path) -> None:
    shape = dict(num_layers=1, num_heads=2, head_dim=66, ffn=130, vocab=65)
    sizes = {"d": 132, "kv": 132, "ffn": 130, "vocab": 65}
    weights = load(write_checkpoint(tmp_path, **shape, seed=8)).weights
    written = random_tensors(sizes, 1, "llada", False, False, seed=8)
    parts = ["q_proj.weight", "k_proj.weight", "v_proj.weight"]
    assert torch.equal(weights.layers[0].qkv, layer_parts(written, 0, parts))
    assert torch.equal(weights.head, written["model.transformer.ff_out.weight"])


def test_qkv_bias(tmp_path: Path) -> None:
    model = load(write_checkpoint(tmp_path, **SHAPE, include_qkv_bias=True, seed=2))
    written = random_tensors(SIZES, 3, "llada", False, True, seed=2)
    bias = model.weights.layers[2].qkv_bias
    assert bias is not None and model.config.has_qkv_bias
    parts = ["q_proj.bias", "k_proj.bias", "v_proj.bias"]
    assert torch.equal(bias, layer_parts(written, 2, parts))


def test_tensor_names_are_recognised_under_either_config(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, **SHAPE, scheme="llada", seed=4)
    (folder / "model.safetensors").unlink()
    save_tensors(folder, random_tensors(SIZES, 3, "hf", False, False, seed=4))
    expected = random_tensors(SIZES, 3, "llada", False, False, seed=4)
    got = load(folder).weights.layers[0].down
    assert torch.equal(got, expected["model.transformer.blocks.0.ff_out.weight"])


def test_stored_rotary_frequencies_are_ignored(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, **SHAPE, scheme="hf")
    tensors = random_tensors(SIZES, 3, "hf", False, False, seed=0)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_tensors(folder, tensors)
    assert load(folder).config.num_layers == 3


@pytest.mark.parametrize("head_dim", [2, 6, 32, 128, 130])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rope_table_is_bitwise_llada(tmp_path: Path, head_dim: int, theta: float) -> None:
    shape = dict(num_layers=1, num_heads=1, head_dim=head_dim)
    model = load(write_checkpoint(tmp_path, **shape, max_sequence_length=1000, rope_theta=theta))
    # As LLaDA computes it: the halves doubled before cos and sin.
    inv_freq = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim))
    seq = torch.arange(1000, dtype=torch.float)
    freqs = torch.einsum("i , j -> i j", seq, inv_freq)
    positions = torch.cat((freqs, freqs), dim=-1)
    half = head_dim // 2
    assert model.weights.rope.shape == (1000, head_dim)
    assert torch.equal(model.weights.rope[:, :half], positions.cos()[:, :half])
    assert torch.equal(model.weights.rope[:, half:], positions.sin()[:, half:])


def test_embedded_model() -> None:
    model = load_model("tiny", CPU, torch.float32)
    assert model.config.num_parameters == 7_020_672
    assert (model.config.mask_id, model.config.eos_id) == (2, 1)
    assert model.tokenizer is not None
    stored = sum(t.numel() for layer in model.weights.layers for t in vars(layer).values()
                 if t is not None)  # fmt: skip
    weights = model.weights
    stored += weights.embedding.numel() + weights.head.numel() + weights.final_norm.numel()
    assert stored == model.config.num_parameters


def test_no_tokenizer_is_fine(tmp_path: Path) -> None:
    assert load(write_checkpoint(tmp_path)).tokenizer is None


def test_integer_dtype_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="dtype must be a floating-point dtype, got torch.int8"):
        load(folder, torch.int8)


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("piece_bytes", [1, 3000, 2**20])
@pytest.mark.parametrize("num_buffers", [1, 4])
def test_pieces_of_a_tensor(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_rows: int,
    piece_bytes: int,
    num_buffers: int,
) -> None:
    """Every row lands in its place, whatever the pieces are, as it lies or transposed."""
    monkeypatch.setitem(staging.PIECE_BYTES, "cpu", piece_bytes)
    monkeypatch.setitem(staging.NUM_BUFFERS, "cpu", num_buffers)
    file, width, before = tmp_path / "tensor", 11, 5
    written = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(num_rows))
    file.write_bytes(bytes(before) + written.numpy().tobytes() + b"what follows")
    straight = torch.empty(num_rows, width)
    turned = torch.empty(width, num_rows, dtype=torch.float64).t()
    vector = torch.empty(num_rows * width, dtype=torch.bfloat16)
    pieces = []
    for destination in (straight, turned, vector):
        pieces += staging.split(file, before, torch.float32, destination)
    assert max(piece.num_bytes for piece in pieces) <= max(piece_bytes, width * 4)
    staging.copy_pieces(pieces, CPU)
    assert torch.equal(straight, written)
    assert torch.equal(turned, written.double())
    assert torch.equal(vector, written.flatten().bfloat16())


@pytest.mark.parametrize("num_buffers", [1, 4])
def test_no_piece_at_all(monkeypatch: pytest.MonkeyPatch, num_buffers: int) -> None:
    monkeypatch.setitem(staging.NUM_BUFFERS, "cpu", num_buffers)
    staging.copy_pieces([], CPU)


@pytest.mark.parametrize("num_buffers", [1, 4])
def test_a_file_that_shrinks_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_buffers: int
) -> None:
    monkeypatch.setitem(staging.NUM_BUFFERS, "cpu", num_buffers)
    folder = write_checkpoint(tmp_path, **SHAPE)
    files, file = TensorFiles(folder), folder / "model.safetensors"
    name, header = max(files.headers.items(), key=lambda item: item[1].offset)
    with file.open("r+b") as shard:
        shard.truncate(header.offset + 1)
    destination = {name: torch.empty(header.shape)}
    with pytest.raises(CheckpointError, match="model.safetensors could not be read: the file ends"):
        files.copy_to(destination, CPU)
    file.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors could not be read: No such file"):
        files.copy_to(destination, CPU)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_one_copy_and_the_buffers(
    tmp_path: Path, dtype: str, source: str, shards: int
) -> None:
    """Peak resident memory of a load, mapped pages included, stays below the weights, the buffers
    and a small allowance, whatever the shards and the dtype of the checkpoint are."""
    shape = dict(num_layers=8, num_heads=8, head_dim=64, ffn=4096, vocab=2000)
    folder = write_checkpoint(tmp_path, **shape, shards=shards, dtype=getattr(torch, source))
    # VmHWM and not getrusage, whose maximum a process inherits from the one that started it.
    program = f"""
import torch
from pathlib import Path
from elastic_cache.models import load_model
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
load_model("tiny", torch.device("cpu"), torch.float32)
before = peak()
model = load_model({str(folder)!r}, torch.device("cpu"), torch.{dtype})
print(model.weights.num_bytes, peak() - before)
"""
    package = str(Path(__file__).parents[2] / "python")
    output = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": package}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    weights, used = (int(value) for value in output.stdout.split())
    buffers = staging.NUM_BUFFERS["cpu"] * staging.PIECE_BYTES["cpu"]
    assert weights > 100 * 2**20, "too small to tell anything"
    assert used < weights + buffers + 24 * 2**20


def test_model_remembers_how_it_was_loaded(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    model = load(folder, torch.bfloat16)
    assert (model.name, model.device, model.dtype) == (str(folder), CPU, torch.bfloat16)
    assert json.loads((folder / "config.json").read_text())["d_model"] == model.config.hidden_size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_model_written_by_lladas_names_loads_as_it_was(
    tmp_path: Path, tied: bool, has_bias: bool
) -> None:
    """config_fields and named_tensors are what read_config and load_weights read."""
    first, second = tmp_path / "first", tmp_path / "second"
    model = load(write_checkpoint(first, **SHAPE, tied=tied, include_qkv_bias=has_bias))
    second.mkdir()
    config = {"model_type": "llada", **llada.config_fields(model.config)}
    (second / "config.json").write_text(json.dumps(config))
    named = dict(llada.named_tensors(model.config, model.weights))
    save_tensors(second, {name: tensor.contiguous() for name, tensor in named.items()})
    again = load(second)
    assert again.config == model.config
    for got, want in zip(again.weights.layers, model.weights.layers, strict=True):
        for name, tensor in vars(want).items():
            assert vars(got)[name] is tensor is None or torch.equal(vars(got)[name], tensor)
    for name in ("embedding", "final_norm", "head"):
        assert torch.equal(getattr(again.weights, name), getattr(model.weights, name))


def test_memory_of_a_load_to_the_gpu(tmp_path: Path) -> None:
    """At most 1.1 times the weights on the GPU, converted or not; hardly anything on the host."""
    problem = why_unusable(survey([0]), 0)
    if problem is not None:
        pytest.skip(problem.reason)
    gpu = torch.device("cuda", 0)
    shape = dict(num_layers=8, num_heads=8, head_dim=64, ffn=4096, vocab=20000)
    folder = write_checkpoint(tmp_path, **shape, shards=2, dtype=torch.float32, seed=6)
    expected = load(folder, torch.bfloat16).weights
    load_model("tiny", gpu, torch.bfloat16)  # the context and the page-locked buffers
    torch.cuda.empty_cache()
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    host = peak_resident()
    weights = load_model(str(folder), gpu, torch.bfloat16).weights
    # Torch's allocator may give a tensor of some MB up to 1 MB more than it asked for.
    num_tensors = 4 * len(weights.layers) + 2
    assert torch.cuda.memory_allocated() - held <= weights.num_bytes + num_tensors * 2**20
    assert torch.cuda.max_memory_reserved() - reserved < 1.1 * weights.num_bytes + 24 * 2**20
    assert peak_resident() - host < 128 * 2**20
    for got, want in zip(
        vars(weights.layers[3]).values(), vars(expected.layers[3]).values(), strict=True
    ):
        assert got is want is None or torch.equal(got.cpu(), want)
    assert torch.equal(weights.head.cpu(), expected.head)
    assert torch.equal(weights.embedding.cpu(), expected.embedding)


def peak_resident() -> int:
    """VmHWM and not getrusage, whose maximum a process inherits from the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
