"""Recipe: an ordered list of Steps and how to run the result. The same data in Python, YAML, tune and a saved folder.

Checks itself as it is made. Knows no model: compress/plan.py checks a recipe against one, compress/ carries it out.

    steps:
      - quantize: {format: int4, group_size: 32, targets: [Linear]}
      - quantize: {format: int8, targets: [head, embedding]}
    run: {kv_cache: int8, speculation: ngram}

`targets` and `ignore` hold class words (Linear, attention, mlp, head, embedding), canonical names or globs of them
(`layers.3.down`, `layers.*.down`), or regular expressions (`re:layers\\.(0|1)\\..*`). Linear is every matrix of every
decoder layer. Where the head is tied, `head` and `embedding` are the one matrix `embed`. A later step overrides an
earlier one on the matrices that both name, and starts from the original numbers.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hasten.errors import RecipeError

KINDS = ("fp32", "fp16", "bf16", "int8", "int4")
KV_CACHES = ("fp32", "bf16", "int8")
SPECULATIONS = ("none", "ngram")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Quantize:
    """Store the targeted matrices in `format`, rounded to nearest with the scale of least squared error.

    group_size: input columns that share a scale; 0 is one scale a row. None means 32 for int4; for int8 32 in narrow
    models (up to 256 hidden units) and 0 in others.
    symmetric: False stores a zero point beside each scale; int4 only.
    fallback: "int8" lets a matrix whose inputs the group does not divide take the nearest format that fits (a smaller
    group, else int8 with one scale a row); None makes that an error.
    """

    format: str = "int8"
    group_size: int | None = None
    symmetric: bool = True
    targets: tuple[str, ...] = ("Linear",)
    ignore: tuple[str, ...] = ()
    fallback: str | None = None

    def __post_init__(self) -> None:
        _choose("format", self.format, KINDS)
        if self.group_size is not None:
            _check_group(self.format, self.group_size)
        if not isinstance(self.symmetric, bool):
            raise RecipeError(f"symmetric is {self.symmetric!r}, expected true or false")
        if not self.symmetric and self.format != "int4":
            raise RecipeError(f"symmetric: false is for int4, found it with {self.format}: remove it")
        if self.fallback is not None:
            _choose("fallback", self.fallback, ("int8",))
        for key in ("targets", "ignore"):
            object.__setattr__(self, key, _names(key, getattr(self, key)))
        if not self.targets:
            raise RecipeError("targets is empty: name at least one, such as Linear")


Step = Quantize
_STEPS: Mapping[str, type[Step]] = {"quantize": Quantize}


@dataclass(frozen=True, slots=True)
class Run:
    """How the result is run: what LLM does where its caller says nothing. None leaves it to the machine.

    kv_cache: "fp32", "bf16" or "int8". speculation: "none" or "ngram" (prompt lookup). threads: worker threads.
    """

    kv_cache: str | None = None
    speculation: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.kv_cache is not None:
            _choose("kv_cache", self.kv_cache, KV_CACHES)
        if self.speculation is not None:
            _choose("speculation", self.speculation, SPECULATIONS)
        if self.threads is not None and (not _is_int(self.threads) or self.threads < 1):
            raise RecipeError(f"threads is {self.threads!r}, expected a whole number of at least 1")

    @staticmethod
    def from_dict(data: object, name: str = "run") -> "Run":
        """From plain data, called `name` in errors. Raises RecipeError on anything unknown."""
        return _build(Run, name, data)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps in order, and how to run the result. Empty steps leave the model as it is."""

    steps: tuple[Step, ...] = ()
    run: Run = field(default_factory=Run)

    def to_dict(self) -> dict[str, Any]:
        """Plain data of what differs from the defaults; `from_dict` gives the same recipe back."""
        steps = [{_step_name(step): _plain(step, keep=("format", "targets"))} for step in self.steps]
        run = _plain(self.run)
        return {"steps": steps, **({"run": run} if run else {})}

    @staticmethod
    def from_dict(data: object) -> "Recipe":
        """A recipe from plain data. Raises RecipeError on anything unknown, with the nearest known name."""
        top = _mapping("a recipe", data)
        _known_keys("recipe", top, ("steps", "run"))
        raw_steps = top.get("steps") or []
        if not isinstance(raw_steps, list | tuple):
            raise RecipeError(f"steps is {type(raw_steps).__name__}, expected a list of steps")
        return Recipe(tuple(_step(item) for item in raw_steps), Run.from_dict(top.get("run") or {}))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)

    @staticmethod
    def from_yaml(text: str) -> "Recipe":
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe is not YAML: {' '.join(str(error).split())}") from None
        return Recipe.from_dict(data)

    @staticmethod
    def load(source: "Recipe | Mapping[str, Any] | str | Path") -> "Recipe":
        """A recipe from a preset's name, a YAML file, plain data, or a recipe itself."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return Recipe.from_dict(source)
        known = presets()
        if str(source) in known:
            return known[str(source)]
        path = Path(source)
        if path.is_dir():
            path = path / "recipe.yaml"
        if not path.is_file():
            raise RecipeError(f"no preset and no file is named '{source}'{did_you_mean(str(source), known)}")
        try:
            return Recipe.from_yaml(path.read_text(encoding="utf-8"))
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from None


def presets() -> dict[str, Recipe]:
    """The named recipes. One format for every matrix, or int4 layers with an int8 head and embedding (`-head8`)."""
    everything = ("Linear", "head", "embedding")
    out = {
        "bf16": Recipe((Quantize("bf16", targets=everything),)),
        "int8": Recipe((Quantize("int8", targets=everything),)),
    }
    for group in (32, 64, 128):
        out[f"int8-g{group}"] = Recipe((Quantize("int8", group, targets=everything),))
    head = Quantize("int8", targets=("head", "embedding"))
    for group in (32, 64, 128):
        for suffix, symmetric in (("", True), ("-asym", False)):
            out[f"int4-g{group}{suffix}"] = Recipe((Quantize("int4", group, symmetric, everything),))
            out[f"int4-g{group}{suffix}-head8"] = Recipe((Quantize("int4", group, symmetric), head))
    return out


def _check_group(kind: str, group: object) -> None:
    if not _is_int(group) or group not in (0, 32, 64, 128):
        raise RecipeError(f"group_size is {group!r}, expected 0 (one scale a row), 32, 64 or 128")
    if group and kind not in ("int8", "int4"):
        raise RecipeError(f"{kind} has no groups, found group_size {group}: remove it")


def did_you_mean(found: str, known: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """The end of a message on an unknown name: the nearest of `known`, and `listed` (else `known`) to choose from."""
    close = difflib.get_close_matches(found, list(known), n=1)
    meant = f": did you mean '{close[0]}'?" if close else ","
    return f"{meant} expected one of {', '.join(listed or known)}" + ("" if listed is None else ", a name or a glob")


def _step(item: object) -> Step:
    if isinstance(item, Quantize):
        return item
    data = _mapping("a step", item)
    if len(data) != 1:
        raise RecipeError(f"a step has {len(data)} names, expected one, such as quantize: {{format: int8}}")
    name, body = next(iter(data.items()))
    if name not in _STEPS:
        raise RecipeError(f"unknown step '{name}'{did_you_mean(str(name), _STEPS)}")
    return _build(_STEPS[name], str(name), body or {})


def _build(kind: type[T], name: str, body: object) -> T:
    data = _mapping(name, body)
    _known_keys(name, data, [item.name for item in fields(kind)])  # type: ignore[arg-type]
    return kind(**data)


def _step_name(step: Step) -> str:
    return next(name for name, kind in _STEPS.items() if type(step) is kind)


def _plain(item: Step | Run, keep: tuple[str, ...] = ()) -> dict[str, Any]:
    default = type(item)()
    data = {key: value for key, value in asdict(item).items() if key in keep or value != getattr(default, key)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


def _mapping(what: str, data: object) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        found = "empty" if data is None else type(data).__name__
        raise RecipeError(f"{what} is {found}, expected names and values")
    return dict(data)


def _known_keys(what: str, data: Mapping[str, Any], known: Iterable[str]) -> None:
    for key in data:
        if key not in known:
            raise RecipeError(f"unknown key '{key}' in {what}{did_you_mean(str(key), known)}")


def _names(key: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise RecipeError(f"{key} is {value!r}, expected a list of names such as [Linear]")
    return tuple(items)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _choose(key: str, value: object, known: Iterable[str]) -> None:
    if value not in tuple(known):
        raise RecipeError(f"{key} is {value!r}{did_you_mean(str(value), known)}")
