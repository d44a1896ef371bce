"""How a model folder says that it is run: config.json's `hasten.run`, which compress and tune write. One reading of it
for everyone who runs a model."""

from collections.abc import Mapping, Sequence

from hasten.errors import ModelError, RecipeError
from hasten.model.checkpoint import Checkpoint
from hasten.model.spec import ModelSpec
from hasten.recipe import KV_CACHES, Run


def stated_run(checkpoint: Checkpoint) -> Run:
    """The folder's own settings; all None where it has none. Raises ModelError where they are not what a recipe's `run`
    may hold."""
    file, section = checkpoint.path / "config.json", checkpoint.config.get("hasten", {})
    if not isinstance(section, Mapping):
        raise ModelError(f"{file}: hasten is {section!r:.80}, expected names and values")
    try:
        return Run.from_dict(section.get("run", {}), "hasten.run")
    except RecipeError as error:
        raise ModelError(f"{file}: hasten.run: {error}") from None


def default_kv_cache(spec: ModelSpec, known: Sequence[str] = KV_CACHES, stated: str | None = None) -> str:
    """How keys and values are stored where the user says nothing: as the folder states, if this device knows it (one
    tuned on a CPU may state what a GPU does not); fp32 for an fp32 checkpoint on a device that has it, else bf16."""
    if stated in known:
        return str(stated)
    return "fp32" if spec.dtype == "fp32" and "fp32" in known else "bf16"
