"""Predicted speed and memory from sizes and two measured limits, before any weight is loaded.

The roofline model (Williams et al. 2009): a step takes as long as reading its bytes at the measured bandwidth, or as
its operations at the measured peak, whichever is longer. Overheads are left out: a prediction is an upper limit, but
for models small enough to stay in the processor's caches. Counts what a format lets this device leave out: the zeros
of 2:4 where it multiplies them so, experts that no token chose.
"""

from collections.abc import Mapping
from dataclasses import replace

from hasten.compress.plan import Plan
from hasten.compress.targets import MLP, matrix_shapes
from hasten.hardware import Limits
from hasten.model.formats import Format, activation_bits, bytes_of
from hasten.model.spec import ModelSpec
from hasten.receipt import Prediction

KV_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0}  # of one number; int8's scales are a few percent more
PREFILL = 512


def predict(
    spec: ModelSpec,
    formats: Mapping[str, Format],
    limits: Limits,
    kv_cache: str = "bf16",
    context: int = 256,
    streams: tuple[int, ...] = (1, 8),
) -> Prediction:
    """Upper limits of tokens/s with every matrix in its format of `formats`, each stream `context` tokens long."""
    shapes = {**matrix_shapes(spec), **_routers(spec)}
    formats = {name: as_run(formats[name], name, spec, limits.takes) for name in shapes}
    weight_bytes = sum(bytes_of(formats[name], shape) for name, shape in shapes.items())
    kv_read = context * kv_bytes_per_token(spec, kv_cache)

    def seconds(num_tokens: int, num_rows: int, kv: float) -> float:
        operations = 0.0
        for name, (rows, columns) in _multiplied(spec).items():
            tokens = num_tokens * _share(spec, name, 1) if name.startswith("layers.") else num_rows
            operations += 2 * rows * columns * tokens / limits.peak(formats[name].kind)
        return max((weights_read(spec, formats, num_tokens) + kv) / limits.bandwidth, operations)

    decode = {str(n): n / seconds(n, n, n * kv_read) for n in streams}
    token_bytes = int(weights_read(spec, formats, 1) + kv_read)
    return Prediction(decode, PREFILL / seconds(PREFILL, 1, 0), weight_bytes, token_bytes)


def as_run(format: Format, name: str, spec: ModelSpec, takes: tuple[str, ...]) -> Format:
    """How matrix `name`, stored in this format, is multiplied by a device that `takes` some as they are (Limits)."""
    fine = activation_bits(format, name, spec.hidden_size) == 16  # such products have no 2:4
    group = "-g" if format.group_size else ""
    if format.sparse24 and (fine or f"{format.kind}{group}-2of4" not in takes):
        format = replace(format, sparse24=False)
    return Format("bf16") if format.kind == "fp8" and "fp8" not in takes else format


def weights_read(spec: ModelSpec, formats: Mapping[str, Format], num_tokens: int) -> float:
    """Bytes of weights that a step of so many tokens reads: each matrix once, of experts those that a token chose."""
    return sum(
        bytes_of(formats[name], shape) * _share(spec, name, num_tokens) for name, shape in _multiplied(spec).items()
    )


def _multiplied(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """The matrices of a step's products. An embedding reads one row a token, unless it is the head too."""
    head = "embed" if spec.tied_head else "head"
    shapes = {**matrix_shapes(spec), **_routers(spec)}
    return {name: shape for name, shape in shapes.items() if name.startswith("layers.") or name == head}


def _routers(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Routers are read, though no recipe targets them."""
    return {
        f"layers.{index}.router": (layer.experts, spec.hidden_size)
        for index, layer in enumerate(spec.layers)
        if layer.experts
    }


def _share(spec: ModelSpec, name: str, num_tokens: int) -> float:
    """The share of a matrix that so many tokens need: all, but where experts are chosen, here as if evenly."""
    parts = name.split(".")
    layer = spec.layers[int(parts[1])] if len(parts) > 1 else None
    if layer is None or not layer.experts or parts[2] not in MLP:
        return 1.0
    return 1 - (1 - layer.active_experts / layer.experts) ** num_tokens


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> float:
    """Bytes of keys and values that one token adds over all layers."""
    return sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers) * KV_BYTES[dtype]


def all_formats(found: Mapping[str, Format], plan: Plan) -> dict[str, Format]:
    """The format of every matrix once a plan is carried out on a checkpoint that has the formats `found`."""
    return {**found, **plan.formats}


def memory_needed(spec: ModelSpec, prediction: Prediction, kv_cache: str, num_tokens: int) -> int:
    """Bytes of weights and of a KV cache of so many tokens."""
    return prediction.weight_bytes + int(num_tokens * kv_bytes_per_token(spec, kv_cache))
