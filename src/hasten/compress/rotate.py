"""QuaRot (Ashkboos et al. 2024), folded into the weights: hidden states and each head's values are turned by orthogonal
matrices, so that outliers of single channels spread over all and 4-bit weights and 8-bit activations lose less.

An RMS norm without weights commutes with a rotation Q of the residual stream. So each norm's weights first go into the
matrices that read it; then what reads the stream becomes W Q, what writes it Q^T W, and the embedding E Q. A rotation
R of a head's values goes into v (R^T W_v) and out of o (W_o R). The model computes the same; a tied head becomes one of
its own, since the final norm's weights go into it alone. Weights stream through, one at a time.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hasten.backends.torch.tensors import to_tensor, to_weight
from hasten.compress.stage import Context, run_step
from hasten.compress.targets import NORM_OF
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Weight
from hasten.model.spec import Layer, config_of_text
from hasten.model.writer import write_checkpoint
from hasten.steps import Rotate

_WRITES = ("o", "down")


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [size, size] in float64 that mixes all channels evenly: a Hadamard matrix of the
    largest power of two in `size`, times a random rotation of what is left, times random signs."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=random, dtype=torch.float64) * 2 - 1
    power = size & -size
    matrix = hadamard(power)
    if size != power:
        odd = torch.randn((size // power,) * 2, generator=random, dtype=torch.float64)
        matrix = torch.kron(torch.linalg.qr(odd).Q.contiguous(), matrix)
    turned: Tensor = signs[:, None] * matrix
    return turned


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of a power of two, scaled to be orthogonal, float64."""
    matrix = torch.ones((1, 1), dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    scaled: Tensor = matrix / size**0.5
    return scaled


@run_step.register
def _(step: Rotate, source: Path, target: Path, context: Context) -> None:
    checkpoint = open_checkpoint(source)
    config = {key: value for key, value in config_of_text(checkpoint.config).items() if key != "quantization_config"}
    write_checkpoint(target, config, _told(rotated(checkpoint, step.seed, context.device), context), checkpoint.path)


def rotated(checkpoint: Checkpoint, seed: int, device: str = "cpu") -> Iterator[tuple[str, Weight]]:
    """The checkpoint's weights, turned, in its dtype."""
    spec = checkpoint.spec
    stream = orthogonal(spec.hidden_size, seed).to(device, torch.float32)

    def dense(values: Tensor) -> Weight:
        return to_weight(values, spec.dtype)

    embed = _numbers(checkpoint, "embed", device)["embed"]
    yield "embed", dense(embed @ stream)
    for index, layer in enumerate(spec.layers):
        heads = orthogonal(layer.head_dim, seed + 1 + index).to(device, torch.float32)
        found = _numbers(checkpoint, f"layers.{index}.", device)
        turned = turn_layer({name.split(".", 2)[2]: values for name, values in found.items()}, layer, stream, heads)
        for role, values in turned.items():
            vector = values.dim() == 1
            yield f"layers.{index}.{role}", to_weight(values, "fp32") if vector else dense(values)
    final = _numbers(checkpoint, "final_norm", device)["final_norm"]
    yield "final_norm", to_weight(torch.ones_like(final), "fp32")
    head = embed if spec.tied_head else _numbers(checkpoint, "head", device)["head"]
    yield "head", dense(head * final @ stream)


def turn_layer(found: Mapping[str, Tensor], layer: Layer, stream: Tensor, heads: Tensor) -> dict[str, Tensor]:
    """A layer's matrices [N, K] and vectors [N] by role, turned by `stream` [H, H] and `heads` [head_dim, head_dim]."""
    out = dict(found)
    for role, norm in NORM_OF.items():
        if role in out:
            out[role] = found[role] * found[norm] @ stream
    out |= {norm: torch.ones_like(found[norm]) for norm in NORM_OF.values()}
    out["v"] = _by_head(out["v"].T, layer.num_kv_heads, heads).T
    out["o"] = _by_head(out["o"], layer.num_heads, heads)
    if "v.bias" in out:
        out["v.bias"] = _by_head(out["v.bias"][None], layer.num_kv_heads, heads)[0]
    for role in _WRITES:
        out[role] = stream.T @ out[role]
        if f"{role}.bias" in out:
            out[f"{role}.bias"] = out[f"{role}.bias"] @ stream
    return out


def _by_head(values: Tensor, num_heads: int, heads: Tensor) -> Tensor:
    """The columns [.., num_heads * head_dim] of each head turned."""
    split = values.reshape(*values.shape[:-1], num_heads, -1)
    return (split @ heads).flatten(-2)


def _numbers(checkpoint: Checkpoint, prefix: str, device: str) -> dict[str, Tensor]:
    found = {name: to_tensor(weight, device, torch.float32) for name, weight in checkpoint.weights(prefix)}
    return {name: values.flatten() if values.shape[1] == 1 else values for name, values in found.items()}


def _told(weights: Iterator[tuple[str, Weight]], context: Context) -> Iterator[tuple[str, Weight]]:
    num_layers = len(context.plan.spec.layers)
    for name, weight in weights:
        yield name, weight
        if name.endswith(".down"):
            context.tell((int(name.split(".")[1]) + 1) / num_layers, f"rotating layer {name.split('.')[1]}")
