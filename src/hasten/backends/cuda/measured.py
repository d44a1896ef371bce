"""What was measured about one GPU's kernels, kept in the user's cache: tiles, up to how many rows our own kernels
multiply, and where a format loses to bf16. Where a user has measured nothing, what comes with the package for GPUs of
that name. Knows files; tuner.py measures."""

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import triton

from hasten.backends.cuda.tuning import Tile
from hasten.errors import ResourceError


@dataclass(frozen=True)
class Measured:
    """tiles: by tuning.tile_key. products: of each kind of layer (tuner.signature), by batch size, milliseconds of a
    layer's products as stored and of the same in bf16. few_rows: of each kind of layer, by Matrix.stored, see
    tuning.FEW_ROWS."""

    tiles: dict[str, Tile] = field(default_factory=dict)
    products: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)
    few_rows: dict[str, dict[str, int]] = field(default_factory=dict)


_SHIPPED = Path(__file__).with_name("tables")


def measured_path(gpu: str) -> Path:
    """The user's file for a GPU of this name."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "hasten" / f"kernels-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def read_measured(gpu: str) -> Measured:
    """What is known of a GPU of this name: nothing where nothing was measured, or with another Triton, whose kernels
    are others. Raises ResourceError for a file that is damaged."""
    path = measured_path(gpu)
    if not path.exists():
        path = _SHIPPED / path.name
    try:
        data = json.loads(path.read_text())
        if data["triton"] != triton.__version__:
            return Measured()
        return Measured(
            {key: Tile(*map(int, numbers)) for key, numbers in data["tiles"].items()},
            {
                kind: {int(batch): (float(ours), float(dense)) for batch, (ours, dense) in times.items()}
                for kind, times in data["products"].items()
            },
            {
                kind: {stored: int(rows) for stored, rows in limits.items()}
                for kind, limits in data.get("few_rows", {}).items()
            },
        )
    except FileNotFoundError:
        return Measured()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResourceError(
            f"{path} is not what `hasten bench --tune-kernels` writes ({error!r:.80}): delete it"
        ) from None


def write_measured(gpu: str, measured: Measured) -> Path:
    """Keep it, whole or not at all; where."""
    path = measured_path(gpu)
    data = {
        "gpu": gpu,
        "triton": triton.__version__,
        "tiles": {
            key: [tile.rows, tile.columns, tile.splits, tile.warps, tile.stages]
            for key, tile in sorted(measured.tiles.items())
        },
        "few_rows": measured.few_rows,
        "products": measured.products,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(data, indent=1))
        part.replace(path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror}; set XDG_CACHE_HOME to a folder that can") from None
    return path
