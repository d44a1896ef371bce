"""CpuBackend: the Backend protocol over hasten._core. Gathers weights into the stacks that the core packs; the rest is
passed on. Knows nothing of files or policy."""

import mmap
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.backends.base import Batch, DeviceMemory, Float32, Sampled, SamplingBatch, StepLimits
from hasten.backends.cpu.split import expert_pieces
from hasten.errors import HastenError, ModelError, ResourceError
from hasten.hardware import load_core, memory_available, usable_threads
from hasten.model.formats import Weight, dense_weight, densify, dequantize
from hasten.model.spec import ModelSpec

# Matrices of a layer that read the same input, in the order in which their outputs lie side by side.
_ROLES = {
    "q": ("qkv", ("q", "k", "v")),
    "k": ("qkv", ("q", "k", "v")),
    "v": ("qkv", ("q", "k", "v")),
    "o": ("o", ("o",)),
    "gate": ("gate_up", ("gate", "up")),
    "up": ("gate_up", ("gate", "up")),
    "down": ("down", ("down",)),
}


class CpuBackend:
    """See backends.base.Backend. One row's numbers do not depend on what shares its batch, bit for bit.

    threads: how many to use, the caller included; 0 is hardware.usable_threads().
    isa: an instruction set by name, for tests; None takes HASTEN_ISA, else the best that this CPU has.
    Raises ResourceError where the compiled core is missing or does not have the instruction set.
    """

    kv_dtypes: tuple[str, ...] = ("fp32", "bf16", "int8")
    overlaps = False
    usual = StepLimits(max_tokens=512, max_sequences=64, max_rows=128)

    def __init__(self, threads: int = 0, isa: str | None = None) -> None:
        self._core = load_core()
        threads = threads or usable_threads()
        if threads < 0:
            raise ResourceError(f"threads is {threads}, expected 0 (all cores) or more")
        try:
            self.isa: str = self._core.isa(isa)
        except ValueError as error:
            raise ResourceError(f"{error}: change HASTEN_ISA or leave it out") from None
        try:
            self._pool = self._core.Pool(threads)
        except (ValueError, RuntimeError) as error:
            raise ResourceError(f"{error}; ask for fewer threads") from None
        self.threads: int = self._pool.size
        self._sampler = self._core.Sampler(self._pool, self.isa)
        self._decoder: Any = None

    def beside(self) -> "CpuBackend":
        """Another model's backend on the same threads: two pools of their own would wait for work on the same cores."""
        other = copy(self)
        other._decoder = None
        return other

    def load(self, spec: ModelSpec, weights: Iterable[tuple[str, Weight]]) -> None:
        """Pack the weights as they come; arrays of `weights` are not kept. Raises ModelError for one that is missing,
        left over or wrongly shaped, ResourceError where memory does not suffice."""
        try:
            decoder = self._core.Decoder(spec, self._pool, self.isa)
            _add_weights(decoder, spec, ((name, self._multiplied(weight)) for name, weight in weights))
            decoder.finish()
        except ValueError as error:
            raise ModelError(str(error)) from None
        except MemoryError:
            raise ResourceError("memory does not suffice for the weights: use a smaller format") from None
        self._decoder = decoder

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self._loaded.weight_bytes)

    def memory(self, limits: StepLimits) -> DeviceMemory:
        """What is free in this machine now; a step takes little beside it."""
        free = memory_available()
        return DeviceMemory(total=free, free=free)

    def block_bytes(self, block_size: int, dtype: str) -> int:
        """Bytes of one KV block over all layers."""
        with _resource_errors():
            return int(self._loaded.block_bytes(block_size, dtype))

    def allocate(self, num_blocks: int, block_size: int, dtype: str) -> None:
        """Make the KV cache, all zeros; its memory is taken as it fills. An earlier one is dropped."""
        with _resource_errors():
            self._loaded.allocate(num_blocks, block_size, dtype)

    def forward(self, batch: Batch) -> Float32:
        """Run one step; logits float32 [R, vocab_size], overwritten by the next call."""
        logits: Float32 = self._loaded.forward(
            batch.tokens,
            batch.positions,
            batch.slots,
            batch.query_lens,
            batch.context_lens,
            batch.block_tables,
            batch.rows,
        )
        return logits

    def sample(self, logits: Float32, params: SamplingBatch) -> Sampled:
        """Choose one token a row of `logits`; -1 where a logit is NaN."""
        if not params.any_special:
            return Sampled(self._sampler.greedy(logits))
        return Sampled(*self._sampler.sample(logits, params))

    def fetch(self, logits: Float32) -> Float32:
        """Themselves: they are on the host."""
        return logits

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy KV blocks (source, destination), one pair after the other."""
        for source, destination in pairs:
            self._loaded.copy_block(source, destination)

    def _multiplied(self, weight: Weight) -> Weight:
        """A weight in a form that the core multiplies on this CPU: where it cannot leave out zeros, with them; where it
        has no 8-bit floats, in bfloat16."""
        kind = weight.format.kind
        if weight.mask is not None and not (kind in ("int8", "bf16") and self._core.takes(f"{kind}-2of4", self.isa)):
            weight = densify(weight)
        if kind == "fp8" and not self._core.takes(kind, self.isa):
            weight = dense_weight(dequantize(weight), "bf16")
        return weight

    @property
    def _loaded(self) -> Any:
        if self._decoder is None:
            raise ModelError("no model is loaded: call load() first")
        return self._decoder


class _resource_errors:  # noqa: N801 - reads as a statement
    """Turns the core's errors about the cache into ResourceError."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MemoryError):
            raise ResourceError(
                "memory does not suffice for the KV cache: lower max_len or use kv_cache int8"
            ) from None
        if isinstance(error, ValueError) and not isinstance(error, HastenError):
            raise ResourceError(str(error)) from None


def _add_weights(decoder: Any, spec: ModelSpec, weights: Iterable[tuple[str, Weight]]) -> None:
    """Hand over each weight as soon as those that are packed with it have come."""
    waiting: dict[tuple[str, int], dict[str, Weight]] = {}
    for name, weight in expert_pieces(spec, weights):
        if weight.shape[1] == 1 and weight.format.kind == "fp32":
            decoder.add_vector(name, _vector(weight))
            continue
        role, layer, members = _place(name, spec)
        parts = waiting.setdefault((role, layer), {})
        if name in parts:
            raise ModelError(f"weight {name} was given twice")
        parts[name] = weight
        if len(parts) == len(members):
            decoder.add_matrices(role, layer, [(member, parts[member]) for member in members])
            for part in waiting.pop((role, layer)).values():
                _give_back(part.data)
    for (role, layer), parts in waiting.items():
        missing = [name for name in _place(next(iter(parts)), spec)[2] if name not in parts]
        raise ModelError(f"weight {missing[0]} is missing (of {role} in layer {layer})")


def _place(name: str, spec: ModelSpec) -> tuple[str, int, list[str]]:
    """Role, layer (-1 outside the layers) and all names that are packed with `name`."""
    if name in ("embed", "position_embed", "head"):
        return name, -1, [name]
    parts = name.split(".")
    if (expert := _expert(parts, spec)) is not None:
        return expert
    known = parts[0] == "layers" and parts[1].isdigit() and parts[2] in _ROLES if len(parts) in (3, 4) else False
    if not known or int(parts[1]) >= len(spec.layers):
        raise ModelError(f"weight {name} is not part of this model")
    role, members = _ROLES[parts[2]]
    if not spec.gated_mlp and role == "gate_up":
        members = ("up",)
    layer = spec.layers[int(parts[1])]
    pairs = [(f"{member}.a", f"{member}.b") if layer.rank_of(member) else (member,) for member in members]
    stored = [name for pair in pairs for name in pair]
    if ".".join(parts[2:]) not in stored:
        raise ModelError(f"weight {name} is not part of this model")
    return role, int(parts[1]), [f"layers.{parts[1]}.{member}" for member in stored]


def _expert(parts: list[str], spec: ModelSpec) -> tuple[str, int, list[str]] | None:
    """As _place, of a router or an expert's piece; None for others."""
    if len(parts) < 3 or not parts[1].isdigit() or int(parts[1]) >= len(spec.layers):
        return None
    index, split = int(parts[1]), spec.layers[int(parts[1])].experts
    if split and parts[2:] == ["router"]:
        return "router", index, [".".join(parts)]
    if not split or len(parts) != 4 or not parts[3].isdigit() or parts[2] not in ("gate", "up", "down"):
        return None
    if parts[2] == "down":
        return f"down.{parts[3]}", index, [".".join(parts)]
    members = ("gate", "up") if spec.gated_mlp else ("up",)
    return f"gate_up.{parts[3]}", index, [f"layers.{index}.{member}.{parts[3]}" for member in members]


def _give_back(array: NDArray[Any]) -> None:
    """Let the system take the pages of a mapped file that packing has read: a weight that waited for others was read
    again after its checkpoint had let go of it, and would count as this process's memory for good."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or array.flags.writeable or not array.flags.c_contiguous:
        return
    first = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
    last = (first + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    first = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
    if last > first:
        base.madvise(mmap.MADV_DONTNEED, first, last - first)


def _vector(weight: Weight) -> NDArray[np.float32]:
    return np.ascontiguousarray(weight.data, np.float32).reshape(-1)
