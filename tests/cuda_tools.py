"""What tests of the CUDA backend share: each check runs on a GPU, and at small sizes in Triton's interpreter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from cpu_tools import BLOCK, NUM_BLOCKS, batch, run
from numpy.typing import NDArray

from hasten.backends.base import Batch
from hasten.backends.cuda import CudaBackend
from hasten.backends.cuda.composed import split_mlp
from hasten.backends.cuda.device import Device, open_device
from hasten.backends.cuda.linear import Linear
from hasten.backends.cuda.load import Loader, Uploader, _as_fp8, _merged
from hasten.backends.cuda.matrix import Norm
from hasten.backends.cuda.ops import Ops
from hasten.backends.reference import ReferenceBackend
from hasten.backends.reference_math import activate, choose_experts
from hasten.compress.targets import matrix_shapes
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Format, Weight, dense_weight, dequantize, quantize
from hasten.model.spec import ModelSpec, spec_from_config

__all__ = ["BLOCK", "NUM_BLOCKS", "batch", "run"]


def load(path: Path, device: str, kv: str = "fp32", dtype: str | None = None, **options: object) -> CudaBackend:
    checkpoint = open_checkpoint(path)
    backend = CudaBackend(device=device, **options)  # type: ignore[arg-type]
    backend.load(checkpoint.spec if dtype is None else replace(checkpoint.spec, dtype=dtype), checkpoint.weights())
    backend.allocate(NUM_BLOCKS, BLOCK, kv)
    return backend


def fetched(backend: CudaBackend, step: Batch) -> NDArray[np.float32]:
    return np.array(backend.fetch(backend.forward(step)))


def pieces(
    backend: CudaBackend, tokens: NDArray[np.int32], sizes: Sequence[int], blocks: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Logits [T, V] of one sequence, fed in pieces of these sizes."""
    logits, first = [], 0
    for size in sizes:
        logits.append(fetched(backend, batch([(tokens[first : first + size], first, blocks)])))
        first += size
    return np.concatenate(logits)


def tiny_spec(dtype: str) -> ModelSpec:
    """A spec of which only the dtype matters, to load single matrices."""
    config = {
        "model_type": "llama", "vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
        "hidden_act": "silu",
    }  # fmt: skip
    return replace(spec_from_config(config), dtype=dtype)


def make_linear(
    weights: list[Weight], device: Device, dtype: str, gated: bool = False, fp8: bool = False, fixed: bool = False
) -> Linear:
    """The weights on the device as the backend keeps them."""
    ops = Ops(device, False, 1e-5)
    loader = Loader(device, ops, tiny_spec(dtype), None, fixed)
    uploader = Uploader(device)
    matrices = _merged([loader._matrix(weight, uploader) for weight in weights], device)
    uploader.close()
    if fp8:
        matrices = [_as_fp8(matrix) for matrix in matrices]
    return Linear(device, ops, matrices, None, gated, fixed)


def with_zeros(values: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """2:4, and some rows with three zeros of four."""
    out_of_four = rng.random((values.size // 4, 4)).argsort(1).reshape(values.shape)
    return values * (out_of_four < rng.integers(1, 3, (len(values), 1)))


def check_product(
    device: str, format: Format | None, dtype: str, rows: int, n: int, k: int, gated: bool, tolerance: float, seed: int
) -> None:
    """x W.T with an activation and a gate, or a residual, against float64; format None is fp8 on load."""
    rng = np.random.default_rng(seed)
    handle = open_device(device)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    values = rng.standard_normal((2 * n if gated else n, k)).astype(np.float32) / np.float32(k**0.5)
    if format is not None and format.sparse24:
        values = with_zeros(values, rng)
    weight = quantize(values, format or Format(dtype))
    linear = make_linear([weight], handle, dtype, gated, fp8=format is None)
    x = torch.from_numpy(rng.standard_normal((rows, k)).astype(np.float32)).to(handle.handle, torch_dtype)
    numbers = dequantize(weight).astype(np.float64)
    if format is None:
        matrix = linear.matrices[0]
        assert matrix.scales is not None
        numbers = (matrix.data.float() * matrix.scales[0, :, None]).cpu().numpy().astype(np.float64)
    want = x.float().cpu().numpy().astype(np.float64) @ numbers.T
    residual = torch.from_numpy(rng.standard_normal((rows, n)).astype(np.float32)).to(handle.handle, torch_dtype)
    torch.empty_like(residual).fill_(float("nan"))  # poisons what the next allocation gets
    if gated:
        got = linear(x, activation="silu")
        want = activate("silu", want[:, :n].astype(np.float32)) * want[:, n:]
    elif linear.fuses_residual(rows):
        got = linear(x, residual=residual, scale=0.5)
        want = 0.5 * want + residual.float().cpu().numpy()
    else:
        got = linear(x, scale=0.5)
        want = 0.5 * want
    error = np.linalg.norm(got.float().cpu().numpy() - want) / np.linalg.norm(want)
    assert error < tolerance, f"relative error {error:.2e}"


def check_normed(
    format: Format, gated: bool, device: str = "cpu", n: int = 8, k: int = 384, tolerance: float = 2e-3
) -> None:
    """One row of int4 or 2:4 with its norm, at sizes of numbers that float16 could not hold, against float64."""
    rng = np.random.default_rng(7)
    handle = open_device(device)
    values = rng.standard_normal((2 * n if gated else n, k)).astype(np.float32) / np.float32(k**0.5)
    weight = quantize(with_zeros(values, rng) if format.sparse24 else values, format)
    linear = make_linear([weight], handle, "bf16", gated)
    norm = torch.from_numpy(rng.uniform(0.5, 2, k)).to(handle.handle, torch.bfloat16)
    assert linear.fuses_norm(1, torch.bfloat16, norm)
    for size in (1e-9, 1e6):
        x = torch.from_numpy(size * rng.standard_normal((1, k))).to(handle.handle, torch.bfloat16)
        exact = x.double().cpu().numpy()[0]
        exact = exact / np.sqrt((exact**2).mean() + 1e-5) * norm.double().cpu().numpy()
        want = dequantize(weight).astype(np.float64) @ exact
        if gated:
            want = activate("silu", want[:n].astype(np.float32)) * want[n:]
        got = linear(x, norm=Norm(norm, 1e-5), activation="silu" if gated else "none", dtype=torch.float32)
        error = np.linalg.norm(got[0].cpu().numpy() - want) / np.linalg.norm(want)
        assert error < tolerance, f"relative error {error:.2e} of numbers about {size:g}"


def check_experts(
    device: str, format: Format | None, dtype: str, rows: int, sizes: tuple[int, int, int, int, int], tolerance: float
) -> None:
    """An MLP of which some experts run, one row with its norm, against float64. sizes: hidden, neurons of an expert,
    experts, active ones, and 1 where gated. Experts 1 and 2 have equal scores. format None is fp8 on load."""
    hidden, size, experts, active, gated = sizes
    rng = np.random.default_rng(rows)
    handle = open_device(device)
    width = experts * size
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def weight(n: int, k: int, format: Format | None) -> Weight:
        return quantize(rng.standard_normal((n, k)).astype(np.float32) / np.float32(k**0.5), format or Format(dtype))

    up_weight, down_weight = weight((1 + gated) * width, hidden, format), weight(hidden, width, format)
    scores = dequantize(weight(experts, hidden, Format(dtype)))
    scores[2] = scores[1]
    linears = [
        make_linear([w], handle, dtype, g, format is None) for w, g in ((up_weight, gated == 1), (down_weight, False))
    ]
    router = make_linear([quantize(scores, Format(dtype))], handle, dtype)
    numbers = [dequantize(up_weight), dequantize(down_weight)]
    if format is None:
        numbers = [
            (m.data.float() * m.scales[0, :, None]).cpu().numpy() for m in (linear.matrices[0] for linear in linears)
        ]  # type: ignore[index]
    gate_up, down = split_mlp(linears[0], linears[1], router, experts, active)
    stored = 1 if format is None else format.group_size or 1  # columns that are stored, or scaled, together
    if format is not None and format.kind == "int4":
        stored = max(stored, 128 if format.group_size == 32 else 256)
    assert (
        (linears[0].running is not None) == (linears[1].running is not None) == (format is None or size % stored == 0)
    )
    x = torch.from_numpy(rng.standard_normal((rows, hidden)).astype(np.float32)).to(handle.handle, torch_dtype)
    norm = torch.from_numpy(rng.uniform(0.5, 2, hidden).astype(np.float32)).to(handle.handle)
    exact = x.double().cpu().numpy()
    given: dict[str, Norm] = {}
    if gate_up.fuses_norm(rows, torch_dtype, norm):
        exact = exact / np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5) * norm.double().cpu().numpy()
        given["norm"] = Norm(norm, 1e-5)
    chosen = np.stack([choose_experts(row, active) for row in exact @ scores.T.astype(np.float64)])
    raw = exact @ numbers[0].T.astype(np.float64)
    inner = activate("silu", raw[:, :width].astype(np.float32)) * (raw[:, width:] if gated else 1)
    residual = torch.from_numpy(rng.standard_normal((rows, hidden)).astype(np.float32)).to(handle.handle, torch_dtype)
    want = 0.5 * (inner * np.repeat(chosen, size, 1)) @ numbers[1].T.astype(np.float64)
    torch.empty((rows, width), dtype=torch_dtype, device=handle.handle).fill_(float("nan"))  # poisons what comes next
    between = gate_up(x, activation="silu", **given)
    if down.fuses_residual(rows):
        want += residual.float().cpu().numpy()
        got = down(between, residual=residual, scale=0.5)
    else:
        got = down(between, scale=0.5)
    error = np.linalg.norm(got.float().cpu().numpy() - want) / np.linalg.norm(want)
    assert error < tolerance, f"relative error {error:.2e}"


def composed(path: Path) -> tuple[ModelSpec, list[tuple[str, Weight]]]:
    """The model with some matrices stored as two thin ones, one of them 8-bit floats, and an MLP split into experts in
    one layer, of which a layer's neurons are fewer."""
    checkpoint = open_checkpoint(path)
    first, second, *rest = checkpoint.spec.layers
    half = second.intermediate_size // 8 * 4
    layers = (
        replace(first, ranks=(("k", 7),), experts=4, active_experts=2),
        replace(second, intermediate_size=half, ranks=(("down", 20), ("up", 16))),
        *rest,
    )
    rng, weights = np.random.default_rng(0), []
    for name, weight in checkpoint.weights():
        role = name.removeprefix("layers.1.")
        values = dequantize(weight)
        if role in ("gate", "up", "up.bias"):
            values = values[:half]
        elif role == "down":
            values = values[:, :half]
        layer = layers[int(name.split(".")[1])] if name.startswith("layers.") else first
        rank = layer.rank_of(name.split(".", 2)[-1].removesuffix(".bias"))
        if rank and name.endswith(".bias"):
            weights.append((name.replace(".bias", ".b.bias"), dense_weight(values)))
        elif rank:
            u, s, v = np.linalg.svd(values, full_matrices=False)
            weights.append((f"{name}.a", dense_weight(v[:rank])))
            weights.append((f"{name}.b", dense_weight(u[:, :rank] * s[:rank])))
        elif role == "o":
            weights.append((name, quantize(values, Format("fp8"))))
        else:
            weights.append((name, dense_weight(values) if "layers.1" in name else weight))
    weights.append(("layers.0.router", dense_weight(rng.standard_normal((4, checkpoint.spec.hidden_size)))))
    return replace(checkpoint.spec, layers=layers), weights


def check_composed(device: str, path: Path, tokens: NDArray[np.int32], tolerance: float) -> None:
    """Logits of `composed`, a prompt and then tokens one by one, against the reference's."""
    spec, weights = composed(path)
    got, want = CudaBackend(device=device), ReferenceBackend()
    for backend in (got, want):
        backend.load(spec, weights)
        backend.allocate(NUM_BLOCKS, BLOCK, "fp32")
    blocks = np.arange(NUM_BLOCKS, dtype=np.int32)
    last = len(tokens) - 1
    expected = np.array(want.forward(batch([(tokens, 0, blocks)])))
    found = pieces(got, tokens, [last, 1], blocks)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < tolerance, f"relative error {error:.2e}"


def check_low_rank(device: str, rows: Sequence[int], tolerance: float) -> None:
    """Logits of a layer in which every matrix is two thin ones, k and v alike, gate and up too, against the
    reference's; a sequence in pieces of so many tokens."""
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu", "dtype": "float32",
    }  # fmt: skip
    spec = spec_from_config(config)
    ranks = (("down", 20), ("gate", 24), ("k", 12), ("o", 36), ("q", 21), ("up", 24), ("v", 12))
    spec = replace(spec, layers=(replace(spec.layers[0], ranks=ranks),))
    rng = np.random.default_rng(0)
    weights = [
        (name, dense_weight(rng.standard_normal(shape).astype(np.float32) / np.float32(shape[1] ** 0.5)))
        for name, shape in matrix_shapes(spec).items()
    ]
    norms = ("layers.0.attn_norm", "layers.0.mlp_norm", "final_norm")
    weights += [(name, dense_weight(rng.uniform(0.5, 2, 96).astype(np.float32))) for name in norms]
    tokens = rng.integers(0, 64, sum(rows)).astype(np.int32)
    got, want = CudaBackend(device=device), ReferenceBackend()
    for backend in (got, want):
        backend.load(spec, weights)
        backend.allocate(NUM_BLOCKS, BLOCK, "fp32")
    blocks = np.arange(NUM_BLOCKS, dtype=np.int32)
    expected = np.array(want.forward(batch([(tokens, 0, blocks)])))
    error = np.abs(pieces(got, tokens, rows, blocks) - expected).max() / np.abs(expected).max()
    assert error < tolerance, f"relative error {error:.2e}"
