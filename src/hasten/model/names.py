"""Where a checkpoint keeps each weight: Hugging Face module names, fused and transposed matrices -> canonical names.

Knows the spec and the family's row; opens no file. One Source is one module of the Transformers model; its Parts are
the rows that each canonical matrix takes from it. Reader and writer both go by this table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hasten.model.families import Config, Family, family_of
from hasten.model.spec import Layer, ModelSpec, config_of_text

Role = Literal["linear", "embedding", "norm"]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Canonical name, and which rows of the module's [N, K] matrix are its own, in order."""

    name: str
    rows: slice | NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One module of the checkpoint. shape: (N, K) as canonical; a norm's is (n, 1) and its tensor [n].

    transposed: the tensor is stored [K, N] (GPT-2's Conv1D). bias: whether a `.bias` [N] goes with it. home: the module
    of Transformers that this one is a part of, where a matrix is stored as two thin ones (`HOME.a`, `HOME.b`), or apart
    from others that Transformers fuses with it (`HOME.q`); home_rows: which of its rows come from here.
    """

    module: str
    role: Role
    shape: tuple[int, int]
    parts: tuple[Part, ...]
    transposed: bool = False
    bias: bool = False
    home: str = ""
    home_rows: slice | NDArray[np.int64] | None = None


# canonical name within a layer -> module within a layer, for each layout
_LLAMA = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_PHI3 = {"qkv": "self_attn.qkv_proj", "o": "self_attn.o_proj", "gate_up": "mlp.gate_up_proj", "down": "mlp.down_proj"}
_GPT2 = {"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
_NEOX = {
    "qkv": "attention.query_key_value", "o": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Layout:
    prefix: str
    layers: str
    embed: str
    final_norm: str
    head: str
    linears: dict[str, str]
    norms: dict[str, str]
    position_embed: str = ""
    transposed: bool = False


_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_LAYOUTS = {
    "llama": _Layout("model", "layers", "embed_tokens", "norm", "lm_head", _LLAMA, _NORMS),
    "phi3": _Layout("model", "layers", "embed_tokens", "norm", "lm_head", _PHI3, _NORMS),
    "gpt2": _Layout("transformer", "h", "wte", "ln_f", "lm_head", _GPT2, {"attn_norm": "ln_1", "mlp_norm": "ln_2"},
                    position_embed="wpe", transposed=True),
    "gpt_neox": _Layout("gpt_neox", "layers", "embed_in", "final_layer_norm", "embed_out", _NEOX, _NORMS),
}  # fmt: skip
_PRE_AND_POST = {
    "attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm",
}  # fmt: skip


def sources(spec: ModelSpec, config: Config) -> Iterator[Source]:
    """Every module of the checkpoint, in the order of the forward pass; the head only where it is not tied."""
    family = family_of(spec.family)
    config = {**family.defaults, **config_of_text(config)}
    layout = _LAYOUTS[family.layout]
    vocab, hidden = spec.vocab_size, spec.hidden_size
    yield _whole(f"{layout.prefix}.{layout.embed}", "embed", "embedding", (vocab, hidden))
    if spec.learned_positions:
        shape = (spec.max_position, hidden)
        yield _whole(f"{layout.prefix}.{layout.position_embed}", "position_embed", "embedding", shape)
    for index, layer in enumerate(spec.layers):
        yield from layer_sources(spec, config, index, layer)
    yield _norm(f"{layout.prefix}.{layout.final_norm}", "final_norm", hidden, spec)
    if not spec.tied_head:
        yield _whole(layout.head, "head", "linear", (vocab, hidden))


def base_prefix(spec: ModelSpec) -> str:
    """The prefix that checkpoints of the bare model leave out ("transformer." in the original GPT-2)."""
    return _LAYOUTS[family_of(spec.family).layout].prefix + "."


def layer_sources(spec: ModelSpec, config: Config, index: int, layer: Layer) -> Iterator[Source]:
    """The modules of one layer of these widths and ranks."""
    family = family_of(spec.family)
    config = {**family.defaults, **config_of_text(config)}
    layout = _LAYOUTS[family.layout]
    module, name = f"{layout.prefix}.{layout.layers}.{index}", f"layers.{index}"
    for norm, tensor in _layer_norms(spec, layout).items():
        yield _norm(f"{module}.{tensor}", f"{name}.{norm}", spec.hidden_size, spec)
    if spec.qk_norm != "none":
        widths = {"q_norm": layer.num_heads, "k_norm": layer.num_kv_heads}
        for norm, heads in widths.items():
            width = layer.head_dim * (heads if spec.qk_norm == "full" else 1)
            yield _norm(f"{module}.self_attn.{norm}", f"{name}.{norm}", width, spec)
    shapes = _matrix_shapes(spec, layer)
    for fused, tensor in layout.linears.items():
        parts, rows, columns = [], 0, 0
        for matrix in _members(fused):
            n, columns = shapes[matrix]
            parts.append(Part(f"{name}.{matrix}", slice(rows, rows + n)))
            rows += n
        if family.layout == "gpt_neox" and fused == "qkv":
            parts = _interleaved_heads(name, layer)
        bias = _has_bias(family, config, _members(fused)[0])
        whole = Source(f"{module}.{tensor}", "linear", (rows, columns), tuple(parts), layout.transposed, bias)
        yield from _apart(whole, layer)
    if layer.experts:
        router = f"{module}.{layout.linears['down'].rsplit('.', 1)[0]}.router"
        yield _whole(router, f"{name}.router", "linear", (layer.experts, spec.hidden_size))


def _apart(whole: Source, layer: Layer) -> Iterator[Source]:
    """The module itself, or the matrices that it is stored as where one of its parts has a rank."""
    roles = [part.name.rsplit(".", 1)[1] for part in whole.parts]
    if not any(layer.rank_of(role) for role in roles):
        yield whole
        return
    for role, part in zip(roles, whole.parts, strict=True):
        rows, columns = len(np.arange(whole.shape[0])[part.rows]), whole.shape[1]
        module = whole.module if len(roles) == 1 else f"{whole.module}.{role}"
        rank = layer.rank_of(role)
        shapes = {"a": (rank, columns), "b": (rows, rank)} if rank else {"": (rows, columns)}
        for end, shape in shapes.items():
            dot = f".{end}" if end else ""
            yield Source(
                module + dot,
                "linear",
                shape,
                (Part(part.name + dot, slice(0, shape[0])),),
                bias=whole.bias and end != "a",
                home=whole.module,
                home_rows=part.rows,
            )


def _members(fused: str) -> tuple[str, ...]:
    return {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(fused, (fused,))


def _matrix_shapes(spec: ModelSpec, layer: Layer) -> dict[str, tuple[int, int]]:
    hidden, width = spec.hidden_size, layer.intermediate_size
    q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    return {
        "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q),
        "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width),
    }  # fmt: skip


def _layer_norms(spec: ModelSpec, layout: _Layout) -> dict[str, str]:
    names = _PRE_AND_POST if spec.post_norm else layout.norms
    wanted = {"attn_norm": spec.pre_norm, "mlp_norm": spec.pre_norm, "attn_post_norm": spec.post_norm,
              "mlp_post_norm": spec.post_norm}  # fmt: skip
    return {norm: tensor for norm, tensor in names.items() if wanted[norm]}


def _interleaved_heads(name: str, layer: Layer) -> list[Part]:
    """GPT-NeoX keeps q, k and v of one head together: [heads, 3, head_dim] rows."""
    rows = np.arange(3 * layer.num_heads * layer.head_dim).reshape(layer.num_heads, 3, layer.head_dim)
    return [Part(f"{name}.{matrix}", rows[:, index].reshape(-1)) for index, matrix in enumerate("qkv")]


def _has_bias(family: Family, config: Config, matrix: str) -> bool:
    rule = family.biases.get(matrix, False)
    return bool(config.get(rule, False)) if isinstance(rule, str) else rule


def _whole(module: str, name: str, role: Role, shape: tuple[int, int]) -> Source:
    return Source(module, role, shape, (Part(name, slice(0, shape[0])),))


def _norm(module: str, name: str, width: int, spec: ModelSpec) -> Source:
    return Source(module, "norm", (width, 1), (Part(name, slice(0, width)),), bias=spec.norm == "layer")
