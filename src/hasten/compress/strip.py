"""Whole structures taken out of a model: layers, key-value groups of heads, MLP neurons, hidden units; shapes shrink.

Numpy only; knows which rows and columns of each canonical weight belong to what, not why something goes (shrink.py).
What is left computes what the whole model did with the same structures masked: norms over fewer numbers get their
weights scaled by the root of the widths' ratio (and eps by the ratio), Gemma's embedding factor is made up for.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hasten.errors import RecipeError
from hasten.model.families import FULL, SLIDING, family_of, root_hidden
from hasten.model.formats import DENSE_BYTES, Weight, dense_weight, densify, dequantize, round_to
from hasten.model.spec import Layer, ModelSpec, config_of_text, configured

Indices = NDArray[np.int64]

_READ_HIDDEN = ("q", "k", "v", "gate", "up")  # matrices whose columns are hidden units
_WRITE_HIDDEN = ("o", "down")  # matrices whose rows are


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What stays, as rising indices. groups, neurons: of each old layer, whether that stays or not. groups: key-value
    heads, each with its query heads."""

    layers: Indices
    groups: tuple[Indices, ...]
    neurons: tuple[Indices, ...]
    hidden: Indices


def everything(spec: ModelSpec) -> Kept:
    """Nothing goes."""
    return Kept(
        np.arange(len(spec.layers)),
        tuple(np.arange(layer.num_kv_heads) for layer in spec.layers),
        tuple(np.arange(layer.intermediate_size) for layer in spec.layers),
        np.arange(spec.hidden_size),
    )


def stripped_spec(spec: ModelSpec, kept: Kept) -> ModelSpec:
    """The architecture of what is left."""
    layers = []
    for index in kept.layers:
        layer = spec.layers[index]
        groups = len(kept.groups[index])
        heads = groups * (layer.num_heads // layer.num_kv_heads)
        neurons = len(kept.neurons[index])
        layers.append(replace(layer, num_heads=heads, num_kv_heads=groups, intermediate_size=neurons))
    hidden = len(kept.hidden)
    return replace(
        spec,
        layers=tuple(layers),
        hidden_size=hidden,
        norm_eps=spec.norm_eps * spec.hidden_size / hidden,
        embedding_scale=spec.embedding_scale / _embedding_factor(spec, kept),
    )


def strip(weights: Iterable[tuple[str, Weight]], spec: ModelSpec, kept: Kept) -> Iterator[tuple[str, Weight]]:
    """The weights of what is left, under their new names. RecipeError where widths change and one is quantised."""
    place = {int(old): new for new, old in enumerate(kept.layers)}
    whole = replace(everything(spec), layers=kept.layers)
    same = all(len(now) == len(then) for now, then in zip(_widths(kept), _widths(whole), strict=True))
    for name, weight in weights:
        parts = name.split(".", 2)
        inside = parts[0] == "layers"
        if inside and int(parts[1]) not in place:
            continue
        new = f"layers.{place[int(parts[1])]}.{parts[2]}" if inside else name
        if not same:
            if weight.format.kind not in DENSE_BYTES:
                raise RecipeError(
                    f"{name} is {weight.format.kind}, shrinking takes unquantised models: start from the original"
                )
            weight = densify(weight)
            role, index = parts[-1], int(parts[1]) if inside else 0
            weight = _inside(role, weight, spec, index, kept) if inside else _outside(name, weight, spec, kept)
        yield new, weight


def _widths(kept: Kept) -> Iterator[Indices]:
    yield from (kept.hidden, *kept.groups, *kept.neurons)


def stripped_config(config: Mapping[str, Any], spec: ModelSpec, kept: Kept) -> dict[str, Any]:
    """config.json of what is left: the configuration's own numbers where all layers agree and the architecture's
    Transformers class takes them; each layer's own in its `hasten` section where not."""
    new, family = stripped_spec(spec, kept), family_of(spec.family)
    out = config_of_text(config)
    spelt = {canonical: alias for alias, canonical in family.aliases.items()}

    def put(key: str, value: Any) -> None:
        out.pop(key, None)
        out[spelt.get(key, key)] = value

    put("num_hidden_layers", len(new.layers))
    if len(kept.hidden) < spec.hidden_size:
        put("hidden_size", new.hidden_size)
        put(family.eps_key, new.norm_eps)
    if family.own_head_dim:
        put("head_dim", new.layers[0].head_dim)
    if "layer_types" in family.keys and (out.get("layer_types") or any(layer.window for layer in spec.layers)):
        out["layer_types"] = [SLIDING if _is_sliding(layer, spec) else FULL for layer in new.layers]
    if "no_rope_layers" in family.keys:
        out["no_rope_layers"] = [int(layer.rope >= 0) for layer in new.layers]
    widths = [(layer.num_heads, layer.num_kv_heads, layer.intermediate_size) for layer in new.layers]
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    same_heads = family.own_head_dim or widths[0][0] == spec.layers[0].num_heads
    if len(set(widths)) == 1 and same_heads:
        for key, value in zip(names, widths[0], strict=True):
            if key != "num_key_value_heads" or family.own_head_dim:
                put(key, value)
    return configured(out, new.layers)


def _is_sliding(layer: Layer, spec: ModelSpec) -> bool:
    return layer.rope == 1 if len(spec.ropes) > 1 else layer.window > 0


def _outside(name: str, weight: Weight, spec: ModelSpec, kept: Kept) -> Weight:
    factor = _embedding_factor(spec, kept)
    if name in ("final_norm", "final_norm.bias"):
        # Where the head is the embedding, that one's factor is the norm's too: they cancel.
        tied = spec.tied_head and factor != 1
        return _take(weight, rows=kept.hidden) if tied else _norm(name, weight, kept.hidden, spec)
    if name == "head.bias":
        return weight
    left = _take(weight, columns=kept.hidden)
    if name == "embed" and factor != 1:
        return dense_weight(dequantize(left) * np.float32(factor), weight.format.kind)
    return left


def _embedding_factor(spec: ModelSpec, kept: Kept) -> float:
    """What embeddings must be multiplied by, because the architecture multiplies them by the root of its width."""
    by_width = family_of(spec.family).embedding_scale is root_hidden
    return float((spec.hidden_size / len(kept.hidden)) ** 0.5) if by_width else 1.0


def _inside(role: str, weight: Weight, spec: ModelSpec, index: int, kept: Kept) -> Weight:
    """role: of a matrix, its bias, or a norm."""
    matrix = role.removesuffix(".bias")
    if matrix.startswith(("attn_", "mlp_")):
        return _norm(role, weight, kept.hidden, spec)
    layer = spec.layers[index]
    shared = layer.num_heads // layer.num_kv_heads
    key_values = spread(kept.groups[index], layer.head_dim)
    queries = spread(kept.groups[index], shared * layer.head_dim)
    if matrix in ("q_norm", "k_norm"):
        if spec.qk_norm == "head":
            return weight
        return _norm(role, weight, queries if matrix == "q_norm" else key_values, spec)
    inner = {"q": queries, "o": queries, "k": key_values, "v": key_values}.get(matrix, kept.neurons[index])
    if role.endswith(".bias"):
        return _take(weight, rows=kept.hidden if matrix in _WRITE_HIDDEN else inner)
    if matrix in _WRITE_HIDDEN:
        return _take(weight, rows=kept.hidden, columns=inner)
    assert matrix in _READ_HIDDEN, role
    return _take(weight, rows=inner, columns=kept.hidden)


def spread(groups: Indices, width: int) -> Indices:
    """Indices of groups of `width` successive rows -> those of the rows."""
    return (groups[:, None] * width + np.arange(width)).reshape(-1)


def _take(weight: Weight, rows: Indices | None = None, columns: Indices | None = None) -> Weight:
    data: NDArray[Any] = weight.data
    if rows is not None and len(rows) < len(data):
        data = data[rows]
    if columns is not None and len(columns) < data.shape[1]:
        data = data[:, columns]
    return replace(weight, shape=(data.shape[0], data.shape[1]), data=data)


def _norm(name: str, weight: Weight, kept: Indices, spec: ModelSpec) -> Weight:
    """A norm's weights [n, 1] or bias over fewer numbers, as if the mean of squares were still over all."""
    left = _take(weight, rows=kept)
    if len(kept) == weight.shape[0] or name.endswith(".bias"):
        return left
    offset = np.float32(spec.norm_offset)
    values = dequantize(left) * np.float32((weight.shape[0] / len(kept)) ** 0.5)
    return dense_weight(round_to(values - offset, spec.dtype) + offset, "fp32")
