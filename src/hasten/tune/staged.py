"""The folder that a tune is to give, beside its final name until it is whole and was judged."""

import os
import shutil
from pathlib import Path
from types import TracebackType

from hasten.compress.folder import write_folder
from hasten.errors import ResourceError
from hasten.receipt import Receipt
from hasten.recipe import Recipe
from hasten.tune.lab import Lab, now_and_then


class Staged:
    """A context: what was not published when it ends is removed, as is what a killed run left."""

    def __init__(self, out: Path, lab: Lab) -> None:
        self.path = out.with_name(f".{out.name}.staged")
        self._out = out
        self._lab = lab
        self._recipe: Recipe | None = None

    def write(self, recipe: Recipe) -> None:
        """The model under the recipe, in place of what was here. The lab reads these weights from now on. ResourceError
        where it cannot be written."""
        if recipe == self._recipe:
            return
        self._remove()
        tick = self._lab.tick
        told = now_and_then(lambda done, total: tick(f"the folder is written: {done} of {total} matrices"))
        write_folder(self.path, self._lab.checkpoint, recipe, {}, told)
        self._lab.read_from(recipe, self.path)
        self._recipe = recipe

    def publish(self, receipt: Receipt) -> None:
        """The receipt is added, the folder gets its name. ResourceError where that cannot be."""
        try:
            receipt.save(self.path / "receipt.json")
            os.rename(self.path, self._out)
        except OSError as error:
            raise ResourceError(f"{self._out} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> "Staged":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        self._recipe = None
        shutil.rmtree(self.path, ignore_errors=True)
