"""Where a student comes from: the folder that the steps before made, some layers of it, or a configuration alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers

from hasten.compress.strip import everything, strip, stripped_config
from hasten.model.checkpoint import open_checkpoint
from hasten.model.spec import config_of_text, spec_from_config
from hasten.model.writer import TOKENIZER_FILES, write_checkpoint
from hasten.steps import Distill


def student_of(step: Distill, source: Path, work: Path) -> Path:
    """The folder to train: `source` itself, or a new one in `work`."""
    folder = work / "student"
    if folder.is_dir() or (step.student is None and not step.keep_layers):
        return folder if folder.is_dir() else source
    if step.keep_layers:
        take_layers(source, folder, step.keep_layers)
    else:
        from_config(Path(str(step.student)), source, folder, step.seed)
    return folder


def take_layers(source: Path, target: Path, layers: tuple[int, ...]) -> None:
    """Those layers of a model, the rest as it is (DistilBERT, Sanh et al. 2019)."""
    checkpoint = open_checkpoint(source)
    kept = replace(everything(checkpoint.spec), layers=np.array(layers))
    config = stripped_config(checkpoint.config, checkpoint.spec, kept)
    write_checkpoint(target, config, strip(checkpoint.weights(), checkpoint.spec, kept), source)


def from_config(file: Path, source: Path, target: Path, seed: int) -> None:
    """Random weights in the shapes of a configuration, with the tokenizer of `source`."""
    text = config_of_text(json.loads(file.read_text(encoding="utf-8")))
    spec_from_config(text)
    config = transformers.CONFIG_MAPPING[text["model_type"]].from_dict(text)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    partial = target.with_name(target.name + ".partial")
    model.save_pretrained(partial)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            (partial / name).write_bytes((source / name).read_bytes())
    partial.rename(target)
