"""An architecture as data: config.json -> ModelSpec, by a table of families rather than a class per family.

Knows nothing of files or devices. The canonical weight names that the rest of hasten uses:

    embed [V, H] · position_embed [P, H] · final_norm [H] (+ .bias) · head [V, H] (absent where tied) (+ head.bias)
    layers.{i}.{q,k,v,o,gate,up,down}            matrices [N, K]; + `.bias` [N]; `gate` absent in an ungated MLP
    layers.{i}.{attn_norm,attn_post_norm,mlp_norm,mlp_post_norm}   vectors [H] (+ .bias for layernorm)
    layers.{i}.{q_norm,k_norm}                   [head_dim], or the full width where qk_norm is "full"
    layers.{i}.{role}.{a,b}   instead of a matrix of rank r: y = b (a x), a [r, K], b [N, r] (with the matrix's bias)
    layers.{i}.router         [E, H] where the MLP is split into E experts

Matrices come as formats.Weight; vectors too, with shape (n, 1) and kind fp32.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hasten.errors import ModelError
from hasten.model.families import GUARDS, Config, Family, family_of
from hasten.model.layers import Own, own_layers, with_layers
from hasten.model.rope import Rope, rope_from_parameters

__all__ = ["Layer", "ModelSpec", "Rope", "config_of_text", "configured", "spec_from_config"]

Activation = Literal["silu", "gelu", "gelu_tanh"]
Dtype = Literal["fp32", "fp16", "bf16"]

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Far more than any model has: beyond, a damaged file would make tables that no memory holds. Other counts fit 32 bits.
_MOST = {"head_dim": 2**16, "num_hidden_layers": 2**14, "num_attention_heads": 2**14, "num_key_value_heads": 2**14}
DTYPES: Mapping[str, Dtype] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer's own widths. rope: index into ModelSpec.ropes, or -1 for none. window: a query at position p
    sees keys p - window + 1 .. p; 0 means all.

    ranks: of the matrices that are stored as two thin ones, by role. experts: how many equal runs of neurons the MLP is
    split into, 0 is not at all; the `active_experts` with the largest router scores run, unweighted.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope: int = 0
    window: int = 0
    ranks: tuple[tuple[str, int], ...] = ()
    experts: int = 0
    active_experts: int = 0

    def rank_of(self, role: str) -> int:
        """The rank that a matrix is stored in; 0 where it is stored whole."""
        return dict(self.ranks).get(role, 0)


@dataclass(frozen=True, slots=True, eq=False)
class ModelSpec:
    """A decoder-only transformer, described. `family` is config.json's model_type: names the row of families.py that
    files are read and written by; no backend branches on it.

    norm: "rms" or "layer". norm_offset: added to norm weights (Gemma stores w - 1) by the loader, so backends never do.
    pre_norm / post_norm: norms before, and after (before the residual is added), each of attention and MLP.
    parallel_residual: x + attn(norm1 x) + mlp(norm2 x) (GPT-NeoX).
    qk_norm: "none"; "head", an RMS norm over each head's dims (Qwen3, Gemma 3); "full", over all heads at once
    (OLMo-2); before rope. attention_scale multiplies q.k. softcaps: c * tanh(x / c), 0 is off. residual_scale
    multiplies what is added to the residual. embedding_scale multiplies embeddings; logit_scale multiplies logits
    (before the soft cap).
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position: int
    layers: tuple[Layer, ...]
    ropes: tuple[Rope, ...]
    norm: Literal["rms", "layer"]
    norm_eps: float
    norm_offset: float
    pre_norm: bool
    post_norm: bool
    parallel_residual: bool
    qk_norm: Literal["none", "head", "full"]
    activation: Activation
    gated_mlp: bool
    learned_positions: bool
    attention_scale: float
    attention_softcap: float
    final_softcap: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    tied_head: bool
    dtype: Dtype
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def spec_from_config(config: Config) -> ModelSpec:
    """The architecture that a config.json describes.

    Raises ModelError for an architecture, or a feature of one, that is not supported, and for values that make no
    sense. Keys that Transformers does not read for the architecture have no effect, as there.
    """
    config = config_of_text(config)
    family = family_of(config.get("model_type"))
    config = _with_defaults(config, family)
    _check_guards(config, family)
    count = _count(config, "num_hidden_layers")
    layers = tuple(_layer(config, family, index, own) for index, own in enumerate(own_layers(config, count)))
    head_dim = layers[0].head_dim
    return ModelSpec(
        family=str(config["model_type"]),
        vocab_size=_count(config, "vocab_size"),
        hidden_size=_count(config, "hidden_size"),
        max_position=_count(config, "max_position_embeddings"),
        layers=layers,
        ropes=_ropes(config, family, head_dim),
        norm=family.norm,
        norm_eps=_real(config, family.eps_key),
        norm_offset=family.norm_offset,
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        parallel_residual=bool(config.get("use_parallel_residual", False))
        and "use_parallel_residual" in family.defaults,
        qk_norm=family.qk_norm,
        activation=_activation(config, family),
        gated_mlp=family.gated_mlp,
        learned_positions=family.learned_positions,
        attention_scale=_attention_scale(config, family, head_dim),
        attention_softcap=_softcap(config, family, "attn_logit_softcapping"),
        final_softcap=_softcap(config, family, "final_logit_softcapping"),
        embedding_scale=family.embedding_scale(config) if family.embedding_scale else 1.0,
        residual_scale=_real(config, "residual_multiplier") if "residual_multiplier" in family.defaults else 1.0,
        logit_scale=1.0 / _real(config, "logits_scaling") if "logits_scaling" in family.defaults else 1.0,
        tied_head=bool(config["tie_word_embeddings"]),
        dtype=_dtype(config),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_token_ids(config.get("eos_token_id")),
    )


def config_of_text(config: Config) -> dict[str, Any]:
    """The configuration of the text model: `config` itself, or the `text_config` part of a multimodal gemma3, with what
    the outer one says of the whole (tied embeddings, dtype, end-of-sequence ids, quantisation)."""
    if config.get("model_type") != "gemma3":
        return dict(config)
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ModelError("config.json of gemma3 has no text_config; only its text part is supported")
    outer = {
        key: config[key] for key in ("dtype", "torch_dtype", "eos_token_id", "quantization_config") if key in config
    }
    tied = {"tie_word_embeddings": config.get("tie_word_embeddings", True)}
    return {**text, **{k: v for k, v in outer.items() if v is not None}, **tied, "model_type": "gemma3_text"}


def configured(config: Config, layers: Sequence[Layer]) -> dict[str, Any]:
    """The configuration of the text model with these layers: in its `hasten.layers` what its own numbers do not say."""
    text = config_of_text(config)
    own = {**text, "hasten": {key: value for key, value in text.get("hasten", {}).items() if key != "layers"}}
    return with_layers(text, layers, spec_from_config(own).layers)


def _with_defaults(config: Config, family: Family) -> dict[str, Any]:
    spelt = {family.aliases.get(key, key): value for key, value in config.items()}
    filled = {**family.defaults, **spelt}
    if not family.own_head_dim:
        filled.update(num_key_value_heads=None, head_dim=None)
    if family.layout == "gpt2" and filled.get("intermediate_size") is None:
        filled["intermediate_size"] = 4 * _count(filled, "hidden_size")
    return filled


def _check_guards(config: Config, family: Family) -> None:
    for key, allowed in {**GUARDS, **family.guards}.items():
        if key in config and config[key] not in allowed:
            raise ModelError(f"config.json: {key} = {config[key]!r} is not supported for {config['model_type']}")
    for name in config.get("architectures") or []:
        if "For" in name and not name.endswith(("ForCausalLM", "ForConditionalGeneration")):
            raise ModelError(f"config.json: {name} does not generate text; expected a ...ForCausalLM checkpoint")


def _layer(config: Config, family: Family, index: int, mine: Own) -> Layer:
    heads = _count(config, "num_attention_heads")
    kv_heads = heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ModelError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if config.get("head_dim") is None and config["hidden_size"] % heads:
        raise ModelError(f"hidden_size {config['hidden_size']} is not a multiple of num_attention_heads {heads}")
    own = config.get("head_dim") is not None
    head_dim = _count(config, "head_dim") if own else _bounded("head_dim", _count(config, "hidden_size") // heads)
    window = family.window(config, index)
    width = mine.intermediate_size or _count(config, "intermediate_size")
    if mine.experts and width % mine.experts:
        raise ModelError(f"hasten.layers[{index}]: {width} neurons cannot be split into {mine.experts} equal experts")
    heads, kv_heads = mine.num_heads or heads, mine.num_kv_heads or kv_heads
    for role, rank in mine.ranks.items():
        inner = width if role in ("gate", "up", "down") else head_dim * (kv_heads if role in ("k", "v") else heads)
        most = min(inner, _count(config, "hidden_size"))
        if rank > most:
            raise ModelError(f"hasten.layers[{index}].ranks.{role} is {rank}, more than the matrix's {most}")
    return Layer(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=width,
        rope=family.rope_index(config, index),
        window=0 if window >= config["max_position_embeddings"] else window,
        ranks=tuple(sorted(mine.ranks.items())),
        experts=mine.experts,
        active_experts=mine.active_experts,
    )


def _ropes(config: Config, family: Family, head_dim: int) -> tuple[Rope, ...]:
    sets = family.rope_sets(config)
    if any(isinstance(value, Mapping) for parameters in sets for value in parameters.values()):
        raise ModelError(f"rope parameters for each type of layer are not supported for {config['model_type']}")
    return tuple(
        rope_from_parameters(
            parameters,
            head_dim=head_dim,
            max_position=config["max_position_embeddings"],
            default_theta=family.default_theta,
            partial=family.partial_rotary,
            aliases=family.rope_aliases,
        )
        for parameters in sets
    )


def _activation(config: Config, family: Family) -> Activation:
    name = config[family.activation_key]
    if name not in ACTIVATIONS:
        raise ModelError(f"activation {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def _dtype(config: Config) -> Dtype:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype {name!r} is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def _softcap(config: Config, family: Family, key: str) -> float:
    return _real(config, key) if key in family.defaults and config.get(key) is not None else 0.0


def _token_ids(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(item, int) for item in ids):
        raise ModelError(f"config.json: eos_token_id is {value!r}, expected a number or a list of numbers")
    return tuple(ids)


def _count(config: Config, key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key} is {value!r}, expected a positive whole number")
    return _bounded(key, value)


def _bounded(key: str, value: int) -> int:
    most = _MOST.get(key, 2**31 - 1)
    if value > most:
        raise ModelError(f"config.json: {key} is {value!r:.40}, expected at most {most}")
    return value


def _attention_scale(config: Config, family: Family, head_dim: int) -> float:
    """Positive: kernels take the maximum before they scale."""
    for key in ("attention_multiplier", "query_pre_attn_scalar"):
        if key in config:
            _real(config, key)
    return family.attention_scale(config, head_dim)


def _real(config: Config, key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e38:
        raise ModelError(f"config.json: {key} is {value!r:.80}, expected a positive number")
    return float(value)
