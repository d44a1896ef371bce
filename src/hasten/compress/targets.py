"""What a step's targets name, and what a matrix can be stored as. Sees names and shapes, never a weight."""

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from hasten.checks import did_you_mean
from hasten.errors import RecipeError
from hasten.model.formats import NARROW, Format, bytes_of
from hasten.model.spec import ModelSpec
from hasten.steps import Factorize, Gradual, Prune, Quantize, Shrink, Step, step_name

ATTENTION = ("q", "k", "v", "o")
MLP = ("gate", "up", "down")
# The norm whose outputs a matrix reads.
NORM_OF = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "gate": "mlp_norm", "up": "mlp_norm"}
CLASS_WORDS = ("Linear", "attention", "mlp", "head", "embedding")
_OF_A_PRESET = "in a recipe file (hasten compress --show PRESET prints a preset as one)"


def matrix_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Shape [N, K] of every matrix that a recipe can target, by canonical name, in the order of use."""
    shapes = {"embed": (spec.vocab_size, spec.hidden_size)}
    for index, layer in enumerate(spec.layers):
        heads, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        own = {"q": (heads, spec.hidden_size), "k": (kv, spec.hidden_size), "v": (kv, spec.hidden_size)}
        own["o"] = (spec.hidden_size, heads)
        if spec.gated_mlp:
            own["gate"] = (layer.intermediate_size, spec.hidden_size)
        own["up"] = (layer.intermediate_size, spec.hidden_size)
        own["down"] = (spec.hidden_size, layer.intermediate_size)
        for role, rank in layer.ranks:
            rows, columns = own.pop(role)
            own |= {f"{role}.a": (rank, columns), f"{role}.b": (rows, rank)}
        shapes |= {f"layers.{index}.{key}": shape for key, shape in own.items()}
    if not spec.tied_head:
        shapes["head"] = (spec.vocab_size, spec.hidden_size)
    return shapes


def total_bytes(spec: ModelSpec, formats: Mapping[str, Format]) -> int:
    """Bytes of all matrices in these formats."""
    return sum(bytes_of(formats[name], shape) for name, shape in matrix_shapes(spec).items())


def select(names: Iterable[str], targets: Iterable[str], tied_head: bool) -> list[str]:
    """The names that some target matches, in their order. RecipeError on a target that matches none."""
    names = list(names)
    found: set[str] = set()
    for target in targets:
        hits = {name for name in names if _matches(name, target, tied_head)}
        if not hits:
            parts = {name.rsplit(".", 1)[-1] for name in names}
            known = [*CLASS_WORDS, *names, *(f"layers.*.{part}" for part in sorted(parts) if part not in names)]
            raise RecipeError(
                f"target '{target}' matches no matrix of this model{did_you_mean(target, known, CLASS_WORDS)}"
            )
        found |= hits
    return [name for name in names if name in found]


def targeted(step: Quantize | Prune | Gradual | Shrink | Factorize, spec: ModelSpec) -> list[str]:
    """The matrices that a step names and does not ignore. RecipeError where a name matches none, or none is left."""
    shapes = matrix_shapes(spec)
    chosen = select(shapes, step.targets, spec.tied_head)
    ignored = set(select(shapes, step.ignore, spec.tied_head)) if step.ignore else set()
    left = [name for name in chosen if name not in ignored]
    if not left:
        raise RecipeError(
            f"{called(step)} targets {', '.join(step.targets)} and ignores {', '.join(step.ignore)}: nothing is left"
        )
    return left


def called(step: Step | Gradual) -> str:
    return "sparsity" if isinstance(step, Gradual) else step_name(step)


def in_layers(step: Prune | Gradual | Factorize, names: Iterable[str]) -> None:
    for name in names:
        if not name.startswith("layers."):
            raise RecipeError(f"{called(step)} works on matrices of decoder layers, found {name}: ignore it")


def legal_groups(kind: str, num_inputs: int) -> list[int]:
    """Group sizes that a matrix with K inputs can have; 0 is one scale a row."""
    if kind not in ("int8", "int4"):
        return [0]
    return [group for group in (32, 64, 128) if num_inputs % group == 0] + [0]


def stored_as(step: Quantize, spec: ModelSpec, num_inputs: int) -> Format:
    """The Format that a step asks for. Where it names no group, int8 takes groups of 32 in a narrow model, where they
    divide the inputs: the 6 % of bytes cost nothing there, and one scale a row costs agreement."""
    if step.group_size is not None:
        group = step.group_size
    elif step.format == "int8":
        group = 32 if spec.hidden_size <= NARROW and num_inputs % 32 == 0 else 0
    else:
        group = 32 if step.format == "int4" else 0
    return Format(step.format, group, step.symmetric, activations=step.activations)  # type: ignore[arg-type]


def legal_format(name: str, num_inputs: int, wanted: Format, fallback: str | None, others: Collection[int]) -> Format:
    """What a matrix takes. RecipeError names what all that the step targets can take: they have `others` inputs."""
    odd = wanted.kind == "int4" and num_inputs % 2
    if not odd and (wanted.group_size == 0 or num_inputs % wanted.group_size == 0):
        return wanted
    if fallback is not None:
        smaller = [g for g in legal_groups(wanted.kind, num_inputs) if 0 < g < wanted.group_size and not odd]
        if smaller:
            return replace(wanted, group_size=max(smaller))
        return replace(wanted, kind="int8", group_size=0, symmetric=True)
    if odd:
        raise RecipeError(
            f"{name} has {num_inputs} inputs, int4 needs an even number: use int8, or set fallback: int8 {_OF_A_PRESET}"
        )
    groups = [str(group) for group in legal_groups(wanted.kind, math.gcd(*others))]
    if wanted.kind == "int4" and any(num % 2 for num in others):
        groups = []
    choices = f"use group_size {' or '.join(groups)} (0 is one scale a row), or set" if groups else "set"
    raise RecipeError(
        f"{name} has {num_inputs} inputs, not a multiple of group_size {wanted.group_size}: "
        f"{choices} fallback: int8 {_OF_A_PRESET}"
    )


def describe(fmt: Format) -> str:
    """A format in a word: int4-g32, int4-g32-asym, int8, bf16-2of4."""
    group, zeros = f"-g{fmt.group_size}" if fmt.group_size else "", "" if fmt.symmetric else "-asym"
    return f"{fmt.kind}{group}{zeros}{'-2of4' if fmt.sparse24 else ''}"


def _matches(name: str, target: str, tied_head: bool) -> bool:
    if name.endswith((".a", ".b")) and _matches(name[:-2], target, tied_head):
        return True  # a thin matrix is meant where the whole one is
    part = name.rsplit(".", 1)[-1]
    match target:
        case "Linear":
            return name.startswith("layers.")
        case "attention":
            return part in ATTENTION
        case "mlp":
            return part in MLP
        case "head":
            return name == "head" or (tied_head and name == "embed")
        case "embedding":
            return name == "embed"
    if target.startswith("re:"):
        try:
            return re.fullmatch(target[3:], name) is not None
        except re.error as error:
            raise RecipeError(f"target '{target}' is not a regular expression: {error}") from None
    return fnmatch.fnmatchcase(name, target)
