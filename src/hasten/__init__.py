"""hasten makes a language model generate text in seconds on the hardware its user owns, and proves it.

Only public names live here. Each is imported when it is first used, so that `import hasten` costs milliseconds.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hasten import errors

if TYPE_CHECKING:
    from hasten.backends.torch.load import load_torch
    from hasten.engine.llm import LLM
    from hasten.engine.request import SamplingParams
    from hasten.measure.evaluate import evaluate
    from hasten.receipt import Receipt
    from hasten.recipe import Calibration, Recipe, Run
    from hasten.steps import (
        Distill,
        Factorize,
        Finetune,
        Gradual,
        Prune,
        Quantize,
        QuantizeKv,
        Recover,
        Rotate,
        Shrink,
        Smooth,
        SplitExperts,
    )
    from hasten.train.run import compress
    from hasten.tune.run import tune

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "Calibration",
    "Distill",
    "Factorize",
    "Finetune",
    "Gradual",
    "Prune",
    "Quantize",
    "QuantizeKv",
    "Receipt",
    "Recipe",
    "Recover",
    "Rotate",
    "Run",
    "SamplingParams",
    "Shrink",
    "Smooth",
    "SplitExperts",
    "__version__",
    "compress",
    "errors",
    "evaluate",
    "load_torch",
    "tune",
]  # fmt: skip

_STEPS = (
    "Distill", "Factorize", "Finetune", "Gradual", "Prune", "Quantize", "QuantizeKv", "Recover", "Rotate", "Shrink",
    "Smooth", "SplitExperts",
)  # fmt: skip
_HOME = {
    "LLM": "hasten.engine.llm",
    "SamplingParams": "hasten.engine.request",
    "Recipe": "hasten.recipe",
    "Run": "hasten.recipe",
    "Calibration": "hasten.recipe",
    "Receipt": "hasten.receipt",
    "tune": "hasten.tune.run",
    "compress": "hasten.train.run",
    "evaluate": "hasten.measure.evaluate",
    "load_torch": "hasten.backends.torch.load",
    **dict.fromkeys(_STEPS, "hasten.steps"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hasten' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """`tune` and `compress` are functions here and packages below; importing such a package would bind its module over
    the function, in whatever order imports happen. The function stays."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
