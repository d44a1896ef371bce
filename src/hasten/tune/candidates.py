"""What is worth trying: recipes by name, and the units of a search layer by layer. Sees shapes, never weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from hasten.compress.plan import matrix_shapes, resolve
from hasten.model.formats import Format, bytes_of
from hasten.model.spec import ModelSpec
from hasten.recipe import Quantize, Recipe, Run, presets

# Presets in the order in which they are measured: from the most careful to the smallest.
_TRIED = (
    "bf16", "int8", "int8-g32", "int4-g32-asym-head8", "int4-g32-head8", "int4-g32-asym", "int4-g32", "int4-g64",
    "int4-g128",
)  # fmt: skip
# What is stored in one format together: rows of products that read the same input are one matrix to a backend.
_TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def uniform(spec: ModelSpec, found: Mapping[str, Format]) -> dict[str, Recipe]:
    """Recipes with one format for all layers that change something in a model stored as `found`; a matrix whose inputs
    do not fit falls back. Two that come to the same are tried once."""
    out: dict[str, Recipe] = {}
    seen = [dict(found)]
    for name in _TRIED:
        recipe = with_fallback(presets()[name])
        formats = {**found, **resolve(recipe, spec).formats}
        if formats not in seen and total_bytes(spec, formats) < total_bytes(spec, found):
            seen.append(formats)
            out[name] = recipe
    return out


def with_fallback(recipe: Recipe) -> Recipe:
    """The recipe with fallback int8 in every step that quantises to integers."""
    steps = [replace(step, fallback="int8") if step.format in ("int8", "int4") else step for step in recipe.steps]
    return replace(recipe, steps=tuple(steps))


def total_bytes(spec: ModelSpec, formats: Mapping[str, Format]) -> int:
    """Bytes of all matrices in these formats."""
    return sum(bytes_of(formats[name], shape) for name, shape in matrix_shapes(spec).items())


def units(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """What gets one format in the search: the matrices that a backend multiplies together."""
    names = set(matrix_shapes(spec))
    parts: dict[str, tuple[str, ...]] = {}
    for index in range(len(spec.layers)):
        for group in _TOGETHER:
            members = tuple(part for part in group if f"layers.{index}.{part}" in names)
            parts[f"layers.{index}.{'+'.join(members)}"] = tuple(f"layers.{index}.{part}" for part in members)
    return parts | {name: (name,) for name in ("embed", "head") if name in names}


def by_layer(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The matrices of each layer."""
    names = list(matrix_shapes(spec))
    return {
        f"layers.{index}": tuple(name for name in names if name.startswith(f"layers.{index}."))
        for index in range(len(spec.layers))
    }


def by_class(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The same matrices by what they do, over all layers."""
    names = list(matrix_shapes(spec))
    classes = {
        "+".join(group): tuple(name for name in names if name.rsplit(".", 1)[-1] in group) for group in _TOGETHER
    }
    return {key: found for key, found in classes.items() if found}


def mixed(high: Recipe, low: Recipe, names: Iterable[str], spec: ModelSpec) -> Recipe:
    """`high`, but the matrices `names` as `low` stores them."""
    formats = resolve(low, spec).formats
    by_format: dict[Format, list[str]] = {}
    for name in names:
        by_format.setdefault(formats[name], []).append(name)
    steps = [
        Quantize(fmt.kind, fmt.group_size, fmt.symmetric, targets=tuple(members)) for fmt, members in by_format.items()
    ]
    return Recipe((*high.steps, *steps), high.run)


def ways_to_run(name: str, recipe: Recipe, kv_cache: str, threads: int) -> dict[str, Recipe]:
    """The same weights with a smaller KV cache, with speculation, and with half the threads where there are many."""
    ways = {"ngram": Run(speculation="ngram")}
    if kv_cache != "int8":
        ways["kv-int8"] = Run(kv_cache="int8")
    if threads >= 4:
        ways[f"{threads // 2}-threads"] = Run(threads=threads // 2)
    return {f"{name} {key}": replace(recipe, run=merge(recipe.run, run)) for key, run in ways.items()}


def merge(one: Run, other: Run) -> Run:
    """Both ways of running at once; `other` wins."""
    return Run(other.kv_cache or one.kv_cache, other.speculation or one.speculation, other.threads or one.threads)


def saved_bytes(spec: ModelSpec, high: Mapping[str, Format], low: Mapping[str, Format], names: Sequence[str]) -> int:
    """Bytes that these matrices save in their low formats over their high ones."""
    shapes = matrix_shapes(spec)
    return sum(bytes_of(high[name], shapes[name]) - bytes_of(low[name], shapes[name]) for name in names)
