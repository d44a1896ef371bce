"""Dropout where Transformers' decoders have none: of embeddings, and of what each layer adds to the residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.functional import dropout

from hasten.model.names import sources
from hasten.model.spec import config_of_text, spec_from_config

_DROPPED = ("embed", "o", "down")


@contextmanager
def dropped(model: Any, share: float) -> Iterator[None]:
    """While it lasts, `share` of the numbers are zero when `model` trains. Hooks, so that names stay as they are."""
    handles = []
    for module in _modules(model) if share else ():
        handles.append(module.register_forward_hook(lambda m, _, out: dropout(out, share, m.training)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _modules(model: Any) -> Iterator[nn.Module]:
    config: dict[str, Any] = config_of_text(model.config.to_dict())
    for source in sources(spec_from_config(config), config):
        if source.parts[0].name.rsplit(".", 1)[-1] in _DROPPED:
            yield model.get_submodule(source.module)
