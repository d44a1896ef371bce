"""Predicted speed and memory from sizes and two measured limits, before any weight is loaded.

The roofline model (Williams et al. 2009): a step takes as long as reading its bytes at the measured bandwidth, or as
its operations at the measured peak, whichever is longer. Overheads are left out: a prediction is an upper limit, but
for models small enough to stay in the processor's caches.
"""

from collections.abc import Mapping

from hasten.compress.plan import Plan, matrix_shapes
from hasten.hardware import Limits
from hasten.model.formats import Format, bytes_of
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
    shapes = matrix_shapes(spec)
    head = "embed" if spec.tied_head else "head"
    weight_bytes = sum(bytes_of(formats[name], shape) for name, shape in shapes.items())
    # An embedding reads one row a token, unless it is the head too.
    read = {name: shape for name, shape in shapes.items() if name.startswith("layers.") or name == head}
    token_bytes = sum(bytes_of(formats[name], shape) for name, shape in read.items())
    kv_read = context * kv_bytes_per_token(spec, kv_cache)

    def seconds(num_tokens: int, num_rows: int, num_bytes: float) -> float:
        operations = sum(
            2 * shape[0] * shape[1] * (num_rows if name == head else num_tokens) / limits.peak(formats[name].kind)
            for name, shape in read.items()
        )
        return max(num_bytes / limits.bandwidth, operations)

    decode = {str(n): n / seconds(n, n, token_bytes + n * kv_read) for n in streams}
    return Prediction(decode, PREFILL / seconds(PREFILL, 1, token_bytes), weight_bytes, int(token_bytes + kv_read))


def kv_bytes_per_token(spec: ModelSpec, dtype: str) -> float:
    """Bytes of keys and values that one token adds over all layers."""
    return sum(2 * layer.num_kv_heads * layer.head_dim for layer in spec.layers) * KV_BYTES[dtype]


def all_formats(found: Mapping[str, Format], plan: Plan) -> dict[str, Format]:
    """The format of every matrix once a plan is carried out on a checkpoint that has the formats `found`."""
    return {**found, **plan.formats}


def memory_needed(spec: ModelSpec, prediction: Prediction, kv_cache: str, num_tokens: int) -> int:
    """Bytes of weights and of a KV cache of so many tokens."""
    return prediction.weight_bytes + int(num_tokens * kv_bytes_per_token(spec, kv_cache))
