"""A model folder -> a Transformers model in torch, whatever form its matrices have: the numbers that they stand for.

Low rank, experts and per-layer widths become modules of their own (modules.py), which Transformers has not. The model
trains, generates and evaluates as any other; saving it is for who knows canonical names (model/writer.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from hasten.backends.torch.modules import install
from hasten.backends.torch.tensors import TORCH_DTYPES, to_tensor
from hasten.errors import ResourceError
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import Weight
from hasten.model.hub import resolve
from hasten.model.names import Source, sources
from hasten.model.spec import ModelSpec, config_of_text


def load_torch(folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Any:
    """The Transformers model of a folder, a name on the hub, or `demo`, in evaluation mode.

    dtype: of its numbers; None is the model's own. Raises as open_checkpoint does, and ResourceError where the device
    is not there.
    """
    device = _device(device)
    checkpoint = open_checkpoint(resolve(str(folder)))
    spec = checkpoint.spec
    dtype = dtype or TORCH_DTYPES[spec.dtype]
    model = empty_model(checkpoint, device)
    waiting: dict[str, list[Source]] = {}
    owner: dict[str, str] = {}
    for source in sources(spec, checkpoint.config):
        name = source.parts[0].name
        key = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
        waiting.setdefault(key, []).append(source)
        owner |= {part.name: key for part in source.parts}
    held: dict[str, dict[str, Weight]] = {}
    current = ""
    for name, weight in checkpoint.weights():
        key = owner[name.removesuffix(".bias")]
        if current and key != current:
            _fill(model, spec, current, waiting[current], held.pop(current), dtype, device)
        current = key
        held.setdefault(key, {})[name] = weight
    _fill(model, spec, current, waiting[current], held.pop(current), dtype, device)
    if spec.tied_head:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return model  # buffers, such as rotary frequencies, stay in float32, as Transformers keeps them


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ResourceError(f"device is {name!r}, expected a device of torch, such as cpu or cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"device is {str(device)!r}, and no such GPU that torch can use is here: use device cpu")
    return device


def empty_model(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The Transformers model without memory for its parameters; buffers are computed, on the device."""
    text = config_of_text(checkpoint.config)
    for key in ("quantization_config", "hasten"):
        text.pop(key, None)
    text["tie_word_embeddings"] = checkpoint.spec.tied_head
    # Some of Transformers' configurations refuse a hidden width that is no multiple of the heads; it runs all the same.
    known = ("num_attention_heads", "num_key_value_heads") if "head_dim" in text else ()
    heads = {key: text[key] for key in known if key in text}
    config = transformers.CONFIG_MAPPING[text["model_type"]].from_dict({**text, **dict.fromkeys(heads, 1)})
    for key, count in heads.items():
        setattr(config, key, count)
    with _MatricesOnMeta():
        model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.eval()
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def module_of(model: nn.Module, source: Source) -> Any:
    """The module that a source outside of the layers, or a norm, stands for."""
    return model.get_output_embeddings() if source.parts[0].name == "head" else model.get_submodule(source.module)  # type: ignore[operator]


def make_parameter(weight: Weight, dtype: torch.dtype, device: torch.device, add: float = 0.0) -> nn.Parameter:
    """A matrix, or the vector that a Weight of one column stands for."""
    values = to_tensor(weight, device, torch.float32 if add else dtype)
    values = values.flatten() if weight.shape[1] == 1 else values
    return nn.Parameter((values + add if add else values).to(dtype))


def make_linear(name: str, weights: Mapping[str, Weight], dtype: torch.dtype, device: torch.device) -> nn.Linear:
    """A Linear of a canonical matrix and its bias, if it has one."""
    rows, columns = weights[name].shape
    bias = weights.get(f"{name}.bias")
    out = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    out.weight = make_parameter(weights[name], dtype, device)
    if bias is not None:
        out.bias = make_parameter(bias, dtype, device)
    return out


def fill_norm(
    norm: nn.Module,
    spec: ModelSpec,
    source: Source,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    name = source.parts[0].name
    norm.weight = make_parameter(weights[name], dtype, device, -spec.norm_offset)
    if source.bias:
        norm.bias = make_parameter(weights[f"{name}.bias"], dtype, device)


def _fill(
    model: Any,
    spec: ModelSpec,
    key: str,
    part: list[Source],
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """One layer's modules, or one outside of the layers."""
    for source in part:
        if source.role == "norm":
            fill_norm(module_of(model, source), spec, source, weights, dtype, device)
        elif not key.startswith("layers."):
            module = module_of(model, source)
            module.weight = make_parameter(weights[key], dtype, device)
    if key.startswith("layers."):
        names = [p.name for source in part if source.role != "norm" for p in source.parts]
        linears = {name.split(".", 2)[2]: make_linear(name, weights, dtype, device) for name in names}
        path = part[0].module.split(".")
        at = next(i for i, piece in enumerate(path) if piece.isdigit())
        module = cast(nn.Module, model.get_submodule(".".join(path[: at + 1])))
        install(module, spec.layers[int(key.split(".")[1])], part, linears)


class _MatricesOnMeta(TorchFunctionMode):
    """New parameters get no memory; buffers, which are computed and not stored, do. Modules make the first with
    torch.empty, the second otherwise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
