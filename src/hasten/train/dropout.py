"""Dropout where Transformers' decoders have none."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.functional import dropout


@contextmanager
def dropped(modules: Iterable[nn.Module], share: float) -> Iterator[None]:
    """While it lasts, `share` of what these modules give are zeros when they train. Hooks, so that names stay as they
    are."""
    handles = [
        module.register_forward_hook(lambda m, _, out: dropout(out, share, m.training))
        for module in (modules if share else ())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
