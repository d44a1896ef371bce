"""Where a training starts: the folder that the steps before made, some layers of it, or a configuration alone."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hasten.compress.strip import everything, strip, stripped_config
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Weight, dense_weight
from hasten.model.jsonfile import read_json
from hasten.model.names import sources
from hasten.model.spec import config_of_text, spec_from_config
from hasten.model.writer import write_checkpoint
from hasten.steps import Distill


def student_of(step: Distill, source: Path, work: Path) -> Path:
    """The folder to train: `source` itself, or a new one in `work`."""
    folder = work / "student"
    if folder.is_dir() or (step.student is None and not step.keep_layers):
        return folder if folder.is_dir() else source
    if step.keep_layers:
        take_layers(source, folder, step.keep_layers)
    else:
        from_config(read_json(Path(str(step.student))) or {}, source, folder, step.seed)
    return folder


def take_layers(source: Path, target: Path, layers: tuple[int, ...]) -> None:
    """Those layers of a model, the rest as it is (DistilBERT, Sanh et al. 2019)."""
    checkpoint = open_checkpoint(source)
    kept = replace(everything(checkpoint.spec), layers=np.array(layers))
    config = stripped_config(checkpoint.config, checkpoint.spec, kept)
    write_checkpoint(target, config, strip(checkpoint.weights(), checkpoint.spec, kept), source)


def from_config(config: Mapping[str, Any], source: Path, target: Path, seed: int) -> None:
    """Random weights in the shapes of a configuration, with the tokenizer of `source`."""
    text = config_of_text(config)
    write_checkpoint(target, text, random_weights(text, seed), source)


def random_weights(config: Mapping[str, Any], seed: int) -> Iterator[tuple[str, Weight]]:
    """Normal ones of the configuration's initializer_range, norms that change nothing, no bias. What layers add to the
    residual stream starts at zero, for stability."""
    spec, generator = spec_from_config(config), np.random.default_rng(seed)
    spread = float(config.get("initializer_range") or 0.02)
    for source in sources(spec, config):
        for part in source.parts:
            shape = (len(np.arange(source.shape[0])[part.rows]), source.shape[1])
            if source.role == "norm":
                yield part.name, dense_weight(np.ones(shape, np.float32), "fp32")
            elif part.name.removesuffix(".b").rsplit(".", 1)[-1] in ("o", "down"):
                yield part.name, dense_weight(np.zeros(shape, np.float32), spec.dtype)
            else:
                values = generator.standard_normal(shape, np.float32) * np.float32(spread)
                yield part.name, dense_weight(values, spec.dtype)
            if source.bias:
                yield f"{part.name}.bias", dense_weight(np.zeros((shape[0], 1), np.float32), "fp32")
