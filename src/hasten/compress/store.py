"""Finished blocks on disk, so that interrupted work goes on: Weights exactly as they are, and what was noted."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hasten.model.formats import Format, Weight

_ARRAYS = tuple(item.name for item in dataclasses.fields(Weight) if item.name not in ("format", "shape"))


def save(path: Path, weights: Mapping[str, Weight], noted: Mapping[str, Any]) -> None:
    """Write a file of Weights; a reader sees the whole of it or none."""
    arrays: dict[str, Any] = {}
    entries = {}
    for index, (name, weight) in enumerate(weights.items()):
        kept = [key for key in _ARRAYS if getattr(weight, key) is not None]
        arrays |= {f"{index}.{key}": getattr(weight, key) for key in kept}
        entries[name] = {"format": dataclasses.asdict(weight.format), "shape": weight.shape, "arrays": kept}
    text = json.dumps({"weights": entries, "noted": noted})
    temporary = path.with_suffix(".partial")
    with open(temporary, "wb") as file:
        np.savez(file, **arrays, about=np.frombuffer(text.encode(), np.uint8))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def find(path: Path) -> tuple[dict[str, Weight], dict[str, Any]] | None:
    """What `save` wrote; None where there is no file, or not the whole of it: a power cut may leave an empty one."""
    try:
        return load(path)
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        return None


def load(path: Path) -> tuple[dict[str, Weight], dict[str, Any]]:
    """What `save` wrote."""
    with np.load(path) as file:
        about = json.loads(file["about"].tobytes())
        weights = {}
        for index, (name, entry) in enumerate(about["weights"].items()):
            arrays = {key: file[f"{index}.{key}"] for key in entry["arrays"]}
            weights[name] = Weight(Format(**entry["format"]), tuple(entry["shape"]), **arrays)
    return weights, about["noted"]
