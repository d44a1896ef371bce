"""Canonical weights -> tensors on the device, through small pinned buffers: no copy of the model in host memory.
A 2:4 matrix of a kind that kernels/sparse.py does not take is expanded to all its numbers; inputs that a folder would
round to int8 are so in large products only.

Several threads copy at once, for one core reads a mapped file slower than the bus takes it. What must be repacked is
repacked on the device.
"""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hasten.backends.cuda.composed import Composed, split_mlp
from hasten.backends.cuda.decoder import LayerWeights, Weights
from hasten.backends.cuda.device import Device, check_fp8
from hasten.backends.cuda.linear import Linear
from hasten.backends.cuda.matrix import DENSE, FP8, INT4, INT8, Matrix
from hasten.backends.cuda.ops import FP8_DTYPE, NormWeights, Ops
from hasten.backends.cuda.sparse import packed_mask
from hasten.backends.cuda.tuning import SPARSE_KINDS
from hasten.errors import ModelError, ResourceError
from hasten.model.formats import Weight, densify
from hasten.model.spec import ModelSpec

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_CHUNK = 8 << 20
_THREADS = 8
_FP8_MAX = 448.0

_ROLES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}


class Uploader:
    """Copies numpy arrays to the device on threads of its own."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool = ThreadPoolExecutor(_THREADS)
        self._local = threading.local()

    def send(self, array: NDArray[Any], target: torch.Tensor) -> None:
        """Copy an array into `target`, contiguous and of as many bytes, piece by piece on all threads."""
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        flat = target.view(-1).view(torch.uint8)
        pieces: list[Future[None]] = [
            self._pool.submit(self._copy, source[first : first + _CHUNK], flat[first : first + _CHUNK])
            for first in range(0, source.size, _CHUNK)
        ]
        for piece in pieces:
            piece.result()

    def close(self) -> None:
        self._pool.shutdown()

    def _copy(self, source: NDArray[np.uint8], target: torch.Tensor) -> None:
        if not self._device.is_cuda:
            target.copy_(torch.from_numpy(source.copy()))
            return
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device.handle)  # type: ignore[no-untyped-call]
            self._local.buffer = torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=True)
        buffer = self._local.buffer[: source.size]
        buffer.numpy()[:] = source
        # The target's memory may have been another tensor's that kernels still read.
        self._local.stream.wait_stream(torch.cuda.default_stream(self._device.handle))
        with torch.cuda.stream(self._local.stream):
            target.copy_(buffer, non_blocking=True)
            self._local.stream.synchronize()


class Loader:
    """Gathers the weights of one model. format: "fp8" quantises the layers' dense matrices on the way.
    fixed: see Linear."""

    def __init__(self, device: Device, ops: Ops, spec: ModelSpec, format: str | None, fixed: bool) -> None:
        self._device = device
        self._ops = ops
        self._spec = spec
        self._format = format
        self._fixed = fixed
        self._dtype = TORCH_DTYPES[spec.dtype]
        self._vectors: dict[str, torch.Tensor] = {}
        self._linears: dict[str, list[Matrix]] = {}

    def load(self, weights: Iterable[tuple[str, Weight]]) -> Weights:
        """All of the model. Raises ModelError for a weight that is missing or left over, ResourceError where the
        device's memory does not suffice."""
        uploader = Uploader(self._device)
        try:
            for name, group in self._groups(_read_ahead(weights)):
                matrices = [self._matrix(weight, uploader) for weight in group]
                if not self._ranked(self._group_of(name)[1]):
                    matrices = _merged(matrices, self._device)
                if self._format == "fp8" and name.startswith("layers."):
                    matrices = [_as_fp8(matrix) for matrix in matrices]
                self._linears[name] = matrices
            return self._assembled()
        except torch.cuda.OutOfMemoryError:
            total = torch.cuda.get_device_properties(self._device.handle).total_memory
            raise ResourceError(
                f"the weights do not fit the GPU's {total / 1e9:.1f} GB: use a smaller format, such as --format fp8"
            ) from None
        finally:
            uploader.close()

    def _groups(self, weights: Iterable[tuple[str, Weight]]) -> Iterator[tuple[str, list[Weight]]]:
        """Names of groups that are multiplied at once ("layers.0.qkv"), with their weights in order."""
        waiting: dict[str, dict[str, Weight]] = {}
        for name, weight in weights:
            if weight.shape[1] == 1 and weight.format.kind == "fp32" and not name.endswith(".b"):
                values = np.array(weight.data, np.float32).reshape(-1)
                self._vectors[name] = torch.from_numpy(values).to(self._device.handle)
                continue
            group, members = self._group_of(name)
            parts = waiting.setdefault(group, {})
            if name in parts or group in self._linears:
                raise ModelError(f"weight {name} was given twice")
            parts[name] = weight
            if len(parts) == len(members):
                yield group, [parts[member] for member in members]
                del waiting[group]
        for group, parts in waiting.items():
            members = self._group_of(next(iter(parts)))[1]
            raise ModelError(f"weight {next(m for m in members if m not in parts)} is missing (of {group})")

    def _group_of(self, name: str) -> tuple[str, list[str]]:
        if name in ("embed", "position_embed", "head"):
            return name, [name]
        first, index, *roles = [*name.split("."), "", ""][:3]
        if first == "layers" and index.isdecimal() and int(index) < len(self._spec.layers):
            layer, prefix, role = self._spec.layers[int(index)], f"layers.{index}", roles[0]
            if role == "router" and layer.experts:
                return name, [name]
            for group, members in _ROLES.items():
                if role in (*members, group):
                    used = [member for member in members if member != "gate" or self._spec.gated_mlp]
                    parts = [[f"{prefix}.{m}.a", f"{prefix}.{m}.b"] if layer.rank_of(m) else [f"{prefix}.{m}"]
                             for m in used]  # fmt: skip
                    return f"{prefix}.{group}", [part for each in parts for part in each]
        raise ModelError(f"weight {name} is not part of this model")

    def _ranked(self, members: list[str]) -> bool:
        """Whether any matrix of a group is stored as two."""
        return any(member.endswith((".a", ".b")) for member in members)

    def _matrix(self, weight: Weight, uploader: Uploader) -> Matrix:
        if not _stays_sparse(weight, self._dtype):
            weight = densify(weight)
        n, k = weight.shape
        mask = None if weight.mask is None else packed_mask(self._upload(weight.mask), k)
        kind = weight.format.kind
        if kind == "fp8":
            check_fp8(self._device, "a folder of 8-bit floats")
        data = torch.from_numpy(np.empty(0, weight.data.dtype)).dtype
        target = torch.empty(weight.data.shape, dtype=data, device=self._device.handle)
        uploader.send(weight.data, target)
        if kind in TORCH_DTYPES:
            return Matrix(DENSE, n, k, target.view(TORCH_DTYPES[kind]).to(self._dtype), mask=mask)
        assert weight.scales is not None
        # float32: what kernels fetch ahead of its use comes in pieces of four bytes at least.
        scales = self._upload(weight.scales).t().contiguous()
        zeros = None if weight.zeros is None else self._upload(weight.zeros).t().contiguous()
        perm = None if weight.perm is None else self._upload(weight.perm)
        group = weight.format.group_size
        if kind == "fp8":
            return Matrix(FP8, n, k, target.view(FP8_DTYPE), scales, None, group, mask=mask)
        if kind == "int8":
            eight = weight.format.activations == "int8"
            return Matrix(INT8, n, k, target, scales, zeros, group, perm, mask, eight)
        if zeros is not None and group == 0:
            group = k  # one group a row: the kernels apply zero points by group
        return Matrix(INT4, n, k, _pack_int4(target, k, group), scales, zeros, group, perm)

    def _upload(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self._device.handle)

    def _assembled(self) -> Weights:
        spec = self._spec
        embed = self._take("embed")
        head = embed if spec.tied_head else self._take("head")
        position = self._dense(self._take("position_embed")[0]) if spec.learned_positions else None
        layers = [self._layer(f"layers.{index}") for index in range(len(spec.layers))]
        final_norm = self._norm("final_norm")
        assert final_norm is not None
        weights = Weights(self._dense(embed[0]), position, layers, final_norm, self._linear(head, ("head",), False))
        for name in [*self._linears, *self._vectors]:
            raise ModelError(f"weight {name} is not part of this model")
        return weights

    def _layer(self, prefix: str) -> LayerWeights:
        spec, layer = self._spec, self._spec.layers[int(prefix.split(".")[1])]
        linears = {role: self._product(prefix, role) for role in _ROLES}
        if layer.experts:
            router = self._linear(self._take(f"{prefix}.router"), (f"{prefix}.router",), False)
            linears["gate_up"], linears["down"] = split_mlp(
                linears["gate_up"], linears["down"], router, layer.experts, layer.active_experts
            )
        has_qk = spec.qk_norm != "none"
        return LayerWeights(
            **linears,
            attn_norm=self._norm(f"{prefix}.attn_norm") if spec.pre_norm else None,
            attn_post_norm=self._norm(f"{prefix}.attn_post_norm") if spec.post_norm else None,
            mlp_norm=self._norm(f"{prefix}.mlp_norm") if spec.pre_norm else None,
            mlp_post_norm=self._norm(f"{prefix}.mlp_post_norm") if spec.post_norm else None,
            q_norm=self._vector(f"{prefix}.q_norm") if has_qk else None,
            k_norm=self._vector(f"{prefix}.k_norm") if has_qk else None,
        )

    def _product(self, prefix: str, role: str) -> Linear:
        """All that reads one input."""
        name, gated = f"{prefix}.{role}", role == "gate_up" and self._spec.gated_mlp
        members = self._group_of(name)[1]
        if not self._ranked(members):
            return self._linear(self._take(name), tuple(members), gated)
        a: list[Matrix] = []
        parts: list[Linear] = []
        starts: list[int | None] = []
        width = 0
        for member, matrix in zip(members, self._take(name), strict=True):
            if member.endswith(".a"):
                a.append(matrix)
                continue
            parts.append(self._linear([matrix], (member,), False))
            starts.append(width if member.endswith(".b") else None)
            width += matrix.k if member.endswith(".b") else 0
        every_a = Linear(self._device, self._ops, _merged(a, self._device), None, False, self._fixed)
        count = 0
        while count < len(parts) and starts[-1 - count] is not None and _joinable(parts[-1], parts[-1 - count], gated):
            count += 1
        joined = self._joined(parts[len(parts) - count :], gated) if count > 1 else None
        return Composed(every_a, parts, starts, gated, joined, count if joined else 0)

    def _joined(self, parts: list[Linear], gated: bool) -> Linear:
        """Parts of low rank that are stored alike as one product, in which each reads columns of its own."""
        first = parts[0]
        matrices = _merged([part.matrices[0] for part in parts], self._device)
        for index, part in enumerate(parts):  # many rows: each by itself
            data = matrices[0].data[index * first.n : (index + 1) * first.n]
            part.matrices = [replace(part.matrices[0], data=data)]
        biases = [part.bias for part in parts if part.bias is not None]
        bias = torch.cat(biases) if biases else None
        segment = 0 if gated else first.n
        return Linear(self._device, self._ops, matrices, bias, gated, self._fixed, up_x=first.k, segment=segment)

    def _take(self, name: str) -> list[Matrix]:
        if name not in self._linears:
            raise ModelError(f"weight {name} is missing")
        return self._linears.pop(name)

    def _vector(self, name: str) -> torch.Tensor:
        if name not in self._vectors:
            raise ModelError(f"weight {name} is missing")
        return self._vectors.pop(name)

    def _norm(self, name: str) -> NormWeights:
        return NormWeights(
            _small(self._vector(name)), self._vector(f"{name}.bias") if self._spec.norm == "layer" else None
        )

    def _linear(self, matrices: list[Matrix], names: tuple[str, ...], gated: bool) -> Linear:
        biases = [self._vectors.pop(f"{name}.bias", None) for name in names]
        bias = None
        if any(b is not None for b in biases):
            rows = _rows_of(matrices, len(names), self._spec, names)
            bias = torch.cat([torch.zeros(n, device=self._device.handle) if b is None else b
                              for b, n in zip(biases, rows, strict=True)])  # fmt: skip
        return Linear(self._device, self._ops, matrices, bias, gated, self._fixed)

    def _dense(self, matrix: Matrix) -> torch.Tensor:
        """The numbers of an embedding, in the dtype of activations."""
        if matrix.kind == DENSE:
            return matrix.data
        linear = Linear(self._device, self._ops, [matrix], None, False, False)
        return linear.expanded(matrix, self._dtype)


def _read_ahead(weights: Iterable[tuple[str, Weight]]) -> Iterator[tuple[str, Weight]]:
    """The same. The next one is read, and its numbers are checked, by a thread while this one is copied."""
    source = iter(weights)
    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(next, source, None)
        while (found := ahead.result()) is not None:
            ahead = reader.submit(next, source, None)
            yield found


def _rows_of(matrices: list[Matrix], count: int, spec: ModelSpec, names: tuple[str, ...]) -> list[int]:
    """Output rows of each named matrix, which may have been merged."""
    if len(matrices) == count:
        return [matrix.n for matrix in matrices]
    if count == 3:
        layer = spec.layers[int(names[0].split(".")[1])]
        return [layer.num_heads * layer.head_dim] + [layer.num_kv_heads * layer.head_dim] * 2
    total = sum(matrix.n for matrix in matrices)
    return [total // count] * count


def _merged(matrices: list[Matrix], device: Device) -> list[Matrix]:
    """One matrix of those that are stored alike; as they are where any differs."""
    first = matrices[0]
    if len(matrices) == 1 or not all(_alike(first, other) for other in matrices):
        return matrices

    def cat(tensors: list[torch.Tensor | None], dim: int) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present, dim).contiguous() if present else None

    data = cat([matrix.data for matrix in matrices], 0)
    assert data is not None
    return [
        Matrix(
            first.kind,
            sum(matrix.n for matrix in matrices),
            first.k,
            data,
            cat([matrix.scales for matrix in matrices], 1),
            cat([matrix.zeros for matrix in matrices], 1),
            first.group,
            first.perm,
            cat([matrix.mask for matrix in matrices], 0),
            all(matrix.int8_inputs for matrix in matrices),
        )
    ]


def _joinable(one: Linear, other: Linear, gated: bool) -> bool:
    """Whether a product can be of both, one below the other; programs take up to 128 rows of one."""
    a, b = one.matrices[0], other.matrices[0]
    same = (one.n, one.k, one.bias is None) == (other.n, other.k, other.bias is None) and _alike(a, b)
    return same and a.mask is None and a.perm is None and (gated or one.n % 128 == 0)


def _alike(one: Matrix, other: Matrix) -> bool:
    if (one.kind, one.group, one.zeros is None) != (other.kind, other.group, other.zeros is None):
        return False
    if (one.mask is None) != (other.mask is None):
        return False
    if one.perm is None or other.perm is None:
        return one.perm is other.perm
    return torch.equal(one.perm, other.perm)


def _stays_sparse(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether kernels take a 2:4 matrix without its zeros."""
    format = weight.format
    return (
        weight.mask is not None
        and format.kind in SPARSE_KINDS
        and format.group_size == 0
        and weight.perm is None
        and (dtype != torch.float32)
    )


def _small(vector: torch.Tensor) -> torch.Tensor:
    """A float32 vector in half the bytes where nothing is lost."""
    half = vector.to(torch.bfloat16)
    return half if torch.equal(half.float(), vector) else vector


def _pack_int4(packed: torch.Tensor, k: int, group: int) -> torch.Tensor:
    """uint8 [N, K / 2] as Weight has it -> int16 [N, ceil(K / 4w) * w], w = 32 or 64, see kernels.skinny."""
    width = 32 if group == 32 else 64
    n = len(packed)
    numbers = torch.stack((packed & 15, packed >> 4), dim=2).view(n, -1)[:, :k]
    padded = torch.nn.functional.pad(numbers, (0, -k % (4 * width)), value=8)
    quarters = padded.view(n, -1, 4, width).to(torch.int32)
    words = quarters[:, :, 0] | quarters[:, :, 1] << 4 | quarters[:, :, 2] << 8 | quarters[:, :, 3] << 12
    return words.to(torch.int16).view(n, -1).contiguous()


def _as_fp8(matrix: Matrix) -> Matrix:
    """A dense matrix rounded to e4m3 with a scale a row; others as they are."""
    if matrix.kind != DENSE:
        return matrix
    scales = matrix.data.abs().amax(dim=1).float().clamp_min(1e-12) / _FP8_MAX
    data = torch.empty_like(matrix.data, dtype=FP8_DTYPE)
    step = max(1, (64 << 20) // matrix.k)
    for first in range(0, matrix.n, step):
        part = slice(first, first + step)
        data[part] = (matrix.data[part].float() / scales[part, None]).to(FP8_DTYPE)
    return Matrix(FP8, matrix.n, matrix.k, data, scales[None].contiguous(), mask=matrix.mask)
