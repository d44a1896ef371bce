"""What is worth trying: recipes by name, and the units of a search layer by layer. Sees shapes, never weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from hasten.compress.plan import resolve
from hasten.compress.targets import matrix_shapes, total_bytes
from hasten.model.formats import Format, bytes_of
from hasten.model.spec import ModelSpec
from hasten.recipe import Recipe, Run, presets
from hasten.steps import Quantize

# Presets in the order in which they are measured: where time ends early, those that differ most were tried.
_TRIED = (
    "bf16", "int8", "int4-g32-asym-head8", "int4-g32", "int4-g64", "int4-g32-asym", "int4-g128", "int4-g32-head8",
    "int8-g32",
)  # fmt: skip
# On a GPU products of int4 with large groups are the fast ones.
_TRIED_CUDA = (
    "bf16", "fp8-dynamic", "int4-g128", "int8", "int4-g128-head8", "int4-g32-asym-head8", "int4-g64", "int4-g32",
)  # fmt: skip
# What is stored in one format together: rows of products that read the same input are one matrix to a backend.
_TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def uniform(spec: ModelSpec, found: Mapping[str, Format], device: str = "cpu") -> dict[str, Recipe]:
    """Recipes with one format for all layers that change something in a model stored as `found`, of those that a
    device has products for; a matrix whose inputs do not fit falls back. Two that come to the same are tried once."""
    out: dict[str, Recipe] = {}
    seen = [dict(found)]
    for name in _TRIED_CUDA if device == "cuda" else _TRIED:
        recipe = with_fallback(presets()[name])
        formats = {**found, **resolve(recipe, spec, found).formats}
        if formats not in seen and total_bytes(spec, formats) < total_bytes(spec, found):
            seen.append(formats)
            out[name] = recipe
    return out


def with_fallback(recipe: Recipe) -> Recipe:
    """The recipe with fallback int8 in every step that quantises to integers."""
    integers = ("int8", "int4")
    steps = [
        replace(step, fallback="int8") if isinstance(step, Quantize) and step.format in integers else step
        for step in recipe.steps
    ]
    return replace(recipe, steps=tuple(steps))


def units(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """What gets one format in the search: the matrices that a backend multiplies together."""
    names = set(matrix_shapes(spec))
    parts: dict[str, tuple[str, ...]] = {}
    for index in range(len(spec.layers)):
        for group in _TOGETHER:
            members = tuple(part for part in group if f"layers.{index}.{part}" in names)
            parts[f"layers.{index}.{'+'.join(members)}"] = tuple(f"layers.{index}.{part}" for part in members)
    return parts | {name: (name,) for name in ("embed", "head") if name in names}


def at_least_as_fine(one: Mapping[str, Format], other: Mapping[str, Format]) -> bool:
    """Whether every matrix keeps as much in `one` as in `other`: as many bits, as small groups, as free zero points."""
    return all(_keeps(one[name], other[name]) for name in other)


def _keeps(one: Format, other: Format) -> bool:
    bits = [
        {"int4": 4, "fp8": 7, "int8": 8}.get(fmt.kind, 16) for fmt in (one, other)
    ]  # fp8 has 3 bits after the point
    groups = [fmt.group_size or 1 << 30 for fmt in (one, other)]
    if bits[0] != bits[1] or bits[0] == 16:
        return bits[0] > bits[1] or one == other
    return groups[0] <= groups[1] and (not one.symmetric or other.symmetric)


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


def ways_to_run(
    name: str, recipe: Recipe, kv_cache: str, threads: int, known: Sequence[str] = ("int8",)
) -> dict[str, Recipe]:
    """The same weights with a smaller KV cache, with speculation, and with half the threads where there are many.
    known: formats of the KV cache that the device has."""
    ways = {"ngram": Run(speculation="ngram")}
    small = next((kind for kind in ("int8", "fp8") if kind in known), kv_cache)
    if kv_cache != small:
        ways[f"kv-{small}"] = Run(kv_cache=small)
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
