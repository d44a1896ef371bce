"""A recipe against an architecture: which matrix takes which Format. Sees names and shapes, never a weight."""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import singledispatch
from pathlib import Path

from hasten.compress.refusals import UNDONE, check_length, check_order, check_teaches, takes_dense, trains, trains_lora
from hasten.compress.targets import (
    MLP,
    NORM_OF,
    _matches,
    describe,
    in_layers,
    legal_format,
    matrix_shapes,
    select,
    stored_as,
    targeted,
)
from hasten.errors import RecipeError
from hasten.model.families import family_of
from hasten.model.formats import DENSE_BYTES, Format
from hasten.model.jsonfile import read_json
from hasten.model.names import sources
from hasten.model.spec import Layer, ModelSpec, spec_from_config
from hasten.recipe import Recipe
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
    Step,
    Training,
    step_name,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a recipe does to a model.

    spec: the architecture after the steps so far. formats: of every matrix that a step quantises; steps: which one it
    is.
    factorized: matrices that become two of a rank that is a multiple of this, or stay whole.
    asked: what the recipe wanted where that did not fit and the step allowed a fallback. sparse: matrices that are to
    hold two zeros in each four successive inputs. zeros: those pruned with zeros at no particular place. overridden:
    the format that a tied head or embedding was to have, until a step that names the other alone gave it another one.
    """

    spec: ModelSpec
    formats: Mapping[str, Format] = field(default_factory=dict)
    steps: Mapping[str, Quantize] = field(default_factory=dict)
    asked: Mapping[str, Format] = field(default_factory=dict)
    sparse: frozenset[str] = frozenset()
    factorized: Mapping[str, int] = field(default_factory=dict)
    zeros: frozenset[str] = frozenset()
    overridden: tuple[str, Format] | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for matrices of one kind that fell back alike, such as "layers.*.down (5)"; one for zeros that make
        nothing faster; and one for a tied head or embedding that the other's step took along."""
        alike: dict[tuple[str, str], list[str]] = {}
        for name, wanted in self.asked.items():
            change = f"{describe(self.formats[name])} instead of {describe(wanted)}"
            alike.setdefault((re.sub(r"\.\d+\.", ".*.", name), change), []).append(name)
        fallen = tuple(
            f"{names[0] if len(names) == 1 else f'{kind} ({len(names)})'}: {change}"
            for (kind, change), names in alike.items()
        )
        more = []
        part, before = self.overridden or ("", None)
        if before is not None and before != self.formats["embed"]:
            more.append(
                f"head and embedding are one matrix in this model: {part} is {describe(self.formats['embed'])} too, "
                f"instead of {describe(before)}"
            )
        if self.zeros:
            more.append(
                f"zeros of {len(self.zeros)} pruned matrices are stored and multiplied like other numbers: "
                "nothing is smaller or faster for them, which takes pattern 2:4 or shrink"
            )
        return (*fallen, *more)


def resolve(recipe: Recipe, spec: ModelSpec, found: Mapping[str, Format] | None = None) -> Plan:
    """Check a recipe against an architecture; nothing is read. RecipeError names the layer and the choices.

    found: formats of the folder that it is carried out on. What is 2:4 there stays so, but behind steps that undo it.
    """
    check_order(recipe)
    found = found or {}
    narrow = [name for name, fmt in found.items() if fmt.kind not in DENSE_BYTES]
    plan = Plan(spec, sparse=frozenset(name for name, fmt in found.items() if fmt.sparse24))
    for step in recipe.steps:
        if narrow and takes_dense(step):
            raise RecipeError(
                f"{narrow[0]} is quantised, {step_name(step)} takes unquantised models: start from the original"
            )
        widened = _stored_whole(step, plan.spec)
        narrow = [name for name in narrow if name not in widened]
        if Prune in UNDONE.get(type(step), ()):
            plan = replace(plan, sparse=frozenset())
        plan = plan_step(step, plan)
        if trains(step):
            check_length(step, recipe, plan.spec, "the model")
        if isinstance(step, Distill) and step.teacher is None:
            check_teaches(step, recipe, spec)
    _check_fused(plan, {**found, **plan.formats})
    return plan


def _stored_whole(step: Step, spec: ModelSpec) -> Collection[str]:
    """The matrices that are no longer quantised after a step, if they were."""
    shapes = matrix_shapes(spec)
    match step:
        case Prune() | Factorize():
            return targeted(step, spec)
        case SplitExperts():
            return select(shapes, ["mlp"], spec.tied_head)
        case Smooth():
            return [name for name in select(shapes, ["Linear"], spec.tied_head) if name.split(".")[2] in NORM_OF]
        case Recover():
            return select(shapes, ["Linear"], spec.tied_head)
        case Rotate() | Training():
            return shapes
        case _:
            return ()


def _check_fused(plan: Plan, formats: Mapping[str, Format]) -> None:
    """What Transformers keeps as one matrix has one format; factors are stored apart."""
    for source in sources(plan.spec, {}):
        names = [part.name for part in source.parts]
        alike = {replace(formats.get(name, Format(plan.spec.dtype)), sparse24=False) for name in names}
        if len(alike) > 1 and plan.factorized.keys().isdisjoint(names):
            raise RecipeError(
                f"{', '.join(names)} are one matrix in Transformers ({source.module}), and would be "
                f"{', '.join(sorted(map(describe, alike)))}: target all of them alike"
            )


@singledispatch
def plan_step(step: object, plan: Plan) -> Plan:
    """The plan after one more step."""
    raise RecipeError(f"no way to apply a step of type {type(step).__name__}")


@plan_step.register
def _(step: Quantize, plan: Plan) -> Plan:
    shapes = matrix_shapes(plan.spec)
    formats, steps, asked = dict(plan.formats), dict(plan.steps), dict(plan.asked)
    names = targeted(step, plan.spec)
    if step.threshold is not None and any(not name.startswith("layers.") for name in names):
        raise RecipeError("threshold is for the layers' matrices: give head and embedding a step of their own")
    if any(name in plan.factorized for name in names) and (step.method == "awq" or step.threshold is not None):
        raise RecipeError(
            "awq and threshold are for matrices that are not factorised: use gptq or rtn without threshold"
        )
    inputs = {name: shapes[name][1] for name in names}
    for name in names:
        if name in plan.factorized:
            inputs |= {f"{name}.a": inputs[name], f"{name}.b": plan.factorized[name]}
    for name, num_inputs in inputs.items():
        asked.pop(name, None)
        wanted = stored_as(step, plan.spec, num_inputs)
        fallback = "int8" if name.endswith(".b") else step.fallback  # its inputs are ranks, which nobody chose
        others = [num for other, num in inputs.items() if not other.endswith(".b")]
        formats[name] = legal_format(name, num_inputs, wanted, fallback, others)
        if name in plan.sparse:
            formats[name] = replace(formats[name], sparse24=True)
        steps[name] = step
        if replace(formats[name], sparse24=False) != wanted:
            asked[name] = wanted
    overridden = _overridden(step, plan, formats) if "embed" in names else plan.overridden
    return replace(plan, formats=formats, steps=steps, asked=asked, overridden=overridden)


def _overridden(step: Quantize, plan: Plan, formats: Mapping[str, Format]) -> tuple[str, Format] | None:
    """What of a tied head and embedding an earlier step named, this one does not, and is changed by it all the same."""
    before, named = plan.steps.get("embed"), _named_ends(step)
    if before is not None and plan.spec.tied_head and formats["embed"] != plan.formats["embed"]:
        for part in _named_ends(before) - named:
            return part, plan.formats["embed"]
    return None if plan.overridden is None or plan.overridden[0] in named else plan.overridden


def _named_ends(step: Quantize) -> set[str]:
    """Which of head and embedding a step's targets name, were they two matrices."""
    ends = {"head": "head", "embedding": "embed"}
    return {part for part, name in ends.items() if any(_matches(name, target, False) for target in step.targets)}


@plan_step.register
def _(step: Prune, plan: Plan) -> Plan:
    return _pruned(step, plan)


def _pruned(step: Prune | Gradual, plan: Plan) -> Plan:
    names = targeted(step, plan.spec)
    in_layers(step, names)
    if step.pattern != "2:4":
        return replace(plan, zeros=plan.zeros | set(names))
    shapes = matrix_shapes(plan.spec)
    for name in names:
        if shapes[name][1] % 4:
            raise RecipeError(f"{name} has {shapes[name][1]} inputs, 2:4 needs a multiple of 4: ignore it")
    sparse = set(names) - set(plan.factorized)
    return replace(plan, sparse=plan.sparse | sparse, zeros=plan.zeros - sparse)


@plan_step.register
def _(step: Factorize, plan: Plan) -> Plan:
    names, shapes = targeted(step, plan.spec), matrix_shapes(plan.spec)
    in_layers(step, names)
    split = {index for index, layer in enumerate(plan.spec.layers) if layer.experts}
    for name in names:
        parts = name.split(".")
        if len(parts) > 3 or name in plan.factorized:
            raise RecipeError(f"{name} is factorised already: ignore it")
        if int(parts[1]) in split and parts[2] in MLP:
            raise RecipeError(f"{name} belongs to experts, which are not factorised: ignore mlp, or do one of the two")
        if step.rank is not None and step.rank > min(shapes[name]):
            raise RecipeError(f"rank is {step.rank}, {name} is a matrix of {shapes[name]}: at most {min(shapes[name])}")
    if step.rank is None:
        _check_keep(step.keep, [shapes[name] for name in names])
    multiples = {name: step.rank or rank_multiple(shapes[name]) for name in names}
    return replace(plan, factorized={**plan.factorized, **multiples})


def _check_keep(keep: float, shapes: Collection[tuple[int, int]]) -> None:
    """RecipeError where the lowest ranks that matrices take, or they themselves, are more than may stay."""
    lowest = sum(min(min(rank_multiple(shape), *shape) * sum(shape), math.prod(shape)) for shape in shapes)
    share = lowest / sum(map(math.prod, shapes))
    if share > keep:
        raise RecipeError(
            f"keep is {keep:g}, and the lowest ranks store {share:.4f} of these matrices' numbers: "
            f"at least {math.ceil(share * 1000) / 1000:g}, or give rank"
        )


@plan_step.register
def _(step: SplitExperts, plan: Plan) -> Plan:
    layers = []
    for index, layer in enumerate(plan.spec.layers):
        width, names = layer.intermediate_size, {f"layers.{index}.{role}" for role in MLP}
        if layer.experts:
            raise RecipeError(f"layer {index} is split into {layer.experts} experts already: remove split_experts")
        if any(layer.rank_of(role) for role in MLP) or names & plan.factorized.keys():
            raise RecipeError(
                f"layer {index}'s mlp is factorised, which is not split: ignore mlp there, or do one of the two"
            )
        if width % step.experts:
            raise RecipeError(
                f"experts is {step.experts}, layer {index} has {width} neurons: take a number that divides it"
            )
        layers.append(replace(layer, experts=step.experts, active_experts=step.active))
    return replace(plan, spec=replace(plan.spec, layers=tuple(layers)))


def rank_multiple(shape: tuple[int, int]) -> int:
    """Ranks are multiples of this: what groups of scales and registers like, where the matrix is large enough."""
    smallest = min(shape)
    return 32 if smallest >= 512 else 8 if smallest >= 64 else 2


@plan_step.register
def _(step: Smooth, plan: Plan) -> Plan:
    if not plan.spec.pre_norm:
        raise RecipeError(f"smooth folds into the norm before a matrix, and {plan.spec.family} has none: remove it")
    return plan


@plan_step.register
def _(step: Rotate, plan: Plan) -> Plan:
    spec = plan.spec
    if spec.norm != "rms" or not spec.pre_norm or spec.post_norm or spec.learned_positions:
        raise RecipeError(
            f"rotate needs RMS norms before attention and MLP and nowhere else, and {spec.family} has others: remove it"
        )
    if any(layer.ranks or layer.experts for layer in spec.layers):
        raise RecipeError("rotate is for models without low-rank matrices and experts: rotate first, then split")
    return replace(plan, spec=replace(spec, tied_head=False))  # the final norm's weights go into the head alone


@plan_step.register
def _(step: Shrink, plan: Plan) -> Plan:
    spec = plan.spec
    if any(layer.ranks or layer.experts for layer in spec.layers):
        raise RecipeError("shrink takes models without low rank and experts: put it before factorize and split_experts")
    if step.hidden and not family_of(spec.family).own_head_dim:
        raise RecipeError(f"hidden is {step.hidden}: {spec.family} ties the width of heads to it, leave it at 0")
    layers = shrunk_layers(step, spec)
    gone = round(step.layers * len(layers))
    if step.layers and not 0 < gone < len(layers):
        raise RecipeError(
            f"layers is {step.layers}, of {len(layers)} that removes {gone}: remove one at least, not all"
        )
    widths = {(layer.num_heads, layer.num_kv_heads, layer.intermediate_size) for layer in layers}
    if gone and len(widths) > 1:
        raise RecipeError("shrink removes layers of different widths: remove layers in a shrink step before the others")
    hidden = shrunk_hidden(step, spec)
    return replace(plan, spec=replace(spec, layers=layers[: len(layers) - gone], hidden_size=hidden))


def shrunk_layers(step: Shrink, spec: ModelSpec) -> tuple[Layer, ...]:
    """Every layer with the widths that the step leaves it, whether it stays or goes."""
    names = set(targeted(step, spec))
    out = []
    for index, layer in enumerate(spec.layers):
        groups, neurons = layer.num_kv_heads, layer.intermediate_size
        if step.heads and f"layers.{index}.o" in names:
            groups = round(groups * (1 - step.heads))
            if not 0 < groups < layer.num_kv_heads:
                raise RecipeError(
                    f"heads is {step.heads}, of layer {index}'s {layer.num_kv_heads} key-value heads that leaves "
                    f"{groups}: whole ones go with their queries, take a multiple of 1/{layer.num_kv_heads}"
                )
        if f"layers.{index}.down" in names:
            neurons = shrunk_width(neurons, step.neurons)
        heads = groups * (layer.num_heads // layer.num_kv_heads)
        out.append(replace(layer, num_heads=heads, num_kv_heads=groups, intermediate_size=neurons))
    return tuple(out)


def shrunk_hidden(step: Shrink, spec: ModelSpec) -> int:
    """Hidden units that are left: where it is not too coarse a multiple of the heads, which some of Transformers'
    architectures want."""
    heads = shrunk_layers(step, spec)[0].num_heads
    return shrunk_width(spec.hidden_size, step.hidden, heads)


def shrunk_width(width: int, share: float, multiple_of: int = 1) -> int:
    """What is left of `width` numbers less a share: the nearest multiple that groups of scales and registers like."""
    if not share:
        return width
    multiple = 64 if width >= 1024 else 32 if width >= 256 else 8 if width >= 64 else 1
    both = math.lcm(multiple, multiple_of)
    multiple = both if 2 * both <= width else multiple
    return min(max(round(width * (1 - share) / multiple), 1) * multiple, width)


@plan_step.register
def _(step: Finetune, plan: Plan) -> Plan:
    return plan if step.sparsity is None else _pruned(step.sparsity, plan)


@plan_step.register
def _(step: Distill, plan: Plan) -> Plan:
    plan = _with_student(step, plan)
    for layer, _ in step.layer_map:
        if layer >= len(plan.spec.layers):
            raise RecipeError(f"layer_map names the student's layer {layer}, it has {len(plan.spec.layers)}")
    return plan if step.sparsity is None else _pruned(step.sparsity, plan)


def _with_student(step: Distill, plan: Plan) -> Plan:
    spec = plan.spec
    if step.keep_layers:
        if step.keep_layers[-1] >= len(spec.layers):
            raise RecipeError(f"keep_layers names layer {step.keep_layers[-1]}, the model has {len(spec.layers)}")
        layers = tuple(spec.layers[index] for index in step.keep_layers)
        place = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate(step.keep_layers)}

        def moved(names: Iterable[str]) -> dict[str, str]:
            parts = ((name, re.split(r"(?<=\d\.)", name, maxsplit=1)) for name in names)
            return {name: place[layer] + role for name, (layer, role) in parts if layer in place}

        sparse, zeros, factorized = moved(plan.sparse), moved(plan.zeros), moved(plan.factorized)
        return replace(
            plan,
            spec=replace(spec, layers=layers),
            sparse=frozenset(sparse.values()),
            zeros=frozenset(zeros.values()),
            factorized={new: plan.factorized[old] for old, new in factorized.items()},
        )
    if step.student is None:
        return plan
    config = read_json(Path(step.student))
    if config is None:
        raise RecipeError(f"student is {step.student}, and there is no such file: give a config.json")
    student = spec_from_config(config)
    if student.vocab_size != spec.vocab_size:
        raise RecipeError(
            f"student {step.student} has a vocabulary of {student.vocab_size}, the model of {spec.vocab_size}: "
            "make them the same, the student takes the model's tokenizer"
        )
    return replace(plan, spec=student, zeros=frozenset())


@plan_step.register
def _(step: Recover, plan: Plan) -> Plan:
    for name, shape in matrix_shapes(plan.spec).items():
        thin = name.endswith((".a", ".b"))  # takes no more than its own rank
        if trains_lora(step) and name.startswith("layers.") and not thin and step.rank > min(shape):
            raise RecipeError(f"rank is {step.rank}, {name} is a matrix of {shape}: at most {min(shape)}")
    return plan


@plan_step.register
def _(step: QuantizeKv, plan: Plan) -> Plan:
    return plan


def only_rounds(steps: Iterable[Step]) -> bool:
    """Whether all that steps do is to round weights as they stream by."""
    return all(
        isinstance(step, Quantize)
        and step.method == "rtn"
        and step.threshold is None
        and step.activations != "fp8-static"
        for step in steps
    )


def reads_text(steps: Iterable[Step]) -> bool:
    """Whether steps look at the recipe's calibration text."""
    return any(_reads_text(step) for step in steps)


def _reads_text(step: Step) -> bool:
    match step:
        case Quantize():
            return not only_rounds([step])
        case Rotate():
            return False
        case Shrink():
            return step.rank_by != "magnitude" or step.layers > 0
        case Training():
            return step.text is None or step.text.endswith(".npy")  # ready tokens are the calibration's
        case Recover():
            return step.method == "block" or step.text is None or step.text.endswith(".npy")
        case _:
            return True
