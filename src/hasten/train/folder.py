"""A model folder opened for training, and written again: Transformers' model, its matrices by canonical name.

Knows how load_torch builds models; no step and no loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hasten.backends.torch.load import load_torch, module_of
from hasten.backends.torch.modules import Experts, Joined, LowRank, MaskedInput
from hasten.backends.torch.tensors import TORCH_DTYPES, to_weight
from hasten.errors import RecipeError
from hasten.model.checkpoint import Checkpoint, open_checkpoint
from hasten.model.formats import DENSE_BYTES, Weight
from hasten.model.names import Source, sources
from hasten.model.spec import config_of_text
from hasten.model.writer import write_checkpoint

_DROPPED = ("embed", "o", "down")


@dataclass(eq=False)
class Opened:
    """model: from load_torch. modules: what holds each canonical weight: Linears, embeddings, norms."""

    model: Any
    checkpoint: Checkpoint
    modules: dict[str, nn.Module]

    def matrices(self) -> dict[str, nn.Linear]:
        """The Linears of the decoder layers; not the routers of experts."""
        return {
            name: module
            for name, module in self.modules.items()
            if isinstance(module, nn.Linear) and name.startswith("layers.") and not name.endswith(".router")
        }

    def weights(self) -> dict[str, Tensor]:
        """Those of `matrices` that train as they are."""
        found = {name: module.weight for name, module in self.matrices().items()}
        return {name: weight for name, weight in found.items() if isinstance(weight, nn.Parameter)}

    def additions(self) -> list[nn.Module]:
        """The modules whose outputs are, or are added to, the residual stream."""
        ends = [name for name in self.modules if name.removesuffix(".b").rsplit(".", 1)[-1] in _DROPPED]
        return [self.modules[name] for name in ends]


def open_folder(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> Opened:
    """RecipeError where matrices are quantised: what was rounded is not trained."""
    checkpoint = open_checkpoint(folder)
    for name, _, fmt in checkpoint.matrices():
        if fmt.kind not in DENSE_BYTES:
            raise RecipeError(f"{name} is {fmt.kind}, training takes unquantised models: start from the original")
    model = load_torch(folder, dtype, device)
    return Opened(model, checkpoint, dict(_modules(model, checkpoint)))


def frozen_dtype(folder: Path, device: str) -> torch.dtype:
    """Of a model that is not trained: float32 on a CPU, its own elsewhere."""
    return torch.float32 if device == "cpu" else TORCH_DTYPES[open_checkpoint(folder).spec.dtype]


def write_folder(opened: Opened, target: Path) -> None:
    """The model as it is now, in the dtype that it was read in, as a folder with the same configuration."""
    checkpoint = opened.checkpoint
    write_checkpoint(target, config_of_text(checkpoint.config), _weights(opened), checkpoint.path)


def _weights(opened: Opened) -> Iterator[tuple[str, Weight]]:
    spec = opened.checkpoint.spec
    for name, module in opened.modules.items():
        weight, bias = cast(Tensor, module.weight), cast(Tensor | None, getattr(module, "bias", None))
        if weight.ndim == 1:
            yield name, to_weight(weight.detach().float() + spec.norm_offset, "fp32")
        else:
            yield name, to_weight(weight, spec.dtype)
        if bias is not None:
            yield f"{name}.bias", to_weight(bias, "fp32")


def _modules(model: Any, checkpoint: Checkpoint) -> Iterator[tuple[str, nn.Module]]:
    taken: dict[str, int] = {}
    for source in sources(checkpoint.spec, checkpoint.config):
        name = source.parts[0].name
        if source.role == "norm" or not name.startswith("layers."):
            yield name, module_of(model, source)
        elif name.endswith(".router"):
            yield name, _descend(model, source.module)
        else:
            yield from _of_matrix(model, source, taken)


def _of_matrix(model: Any, source: Source, taken: dict[str, int]) -> Iterator[tuple[str, nn.Module]]:
    """taken: by home, how many of its parts were given already."""
    home = source.home or source.module
    module = _descend(model, home)
    for part in source.parts:
        end = part.name.rsplit(".", 1)[-1]
        index = taken.get(home, 0)
        own = module.parts[index] if isinstance(module, Joined) else module
        if isinstance(own, LowRank):
            yield part.name, own.a if end == "a" else own.b
        else:
            yield part.name, own
        taken[home] = index + (end != "a")  # a and b are one part


def _descend(model: nn.Module, path: str) -> nn.Module:
    """The module of that path in Transformers' own model; experts stand around it."""
    module = model
    for piece in path.split("."):
        if isinstance(module, Experts) and piece != "router":
            module = module.mlp
        module = cast(nn.Module, getattr(module, piece))
        if isinstance(module, MaskedInput):
            module = module.matrix
    return module
