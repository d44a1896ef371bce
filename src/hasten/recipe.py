"""Recipe: an ordered list of Steps and how to run the result. The same data in Python, YAML, tune and a saved folder.

Checks itself as it is made. Knows no model: compress/plan.py checks a recipe against one, compress/ carries it out.

    steps:
      - quantize: {format: int4, group_size: 32, targets: [Linear]}
      - quantize: {format: int8, targets: [head, embedding]}
    run: {kv_cache: int8, speculation: ngram}
    calibration: {text: books.txt, num_sequences: 128, sequence_len: 512}

`targets` and `ignore` hold class words (Linear, attention, mlp, head, embedding), canonical names or globs of them
(`layers.3.down`, `layers.*.down`), or regular expressions (`re:layers\\.(0|1)\\..*`). Linear is every matrix of every
decoder layer. Where the head is tied, `head` and `embedding` are the one matrix `embed`. A later step overrides an
earlier one on the matrices that both name, and starts from the original numbers.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from hasten.checks import build, choose, count, did_you_mean, is_int, known_keys, mapping, string
from hasten.errors import RecipeError
from hasten.steps import STEPS, TEXT, Distill, Factorize, Prune, Quantize, Rotate, Shrink, Smooth, Step, step_name

KV_CACHES = ("fp32", "bf16", "int8", "fp8")
SPECULATIONS = ("none", "ngram")


@dataclass(frozen=True, slots=True)
class Run:
    """How the result is run: what LLM does where its caller says nothing. None leaves it to the machine.

    kv_cache: "fp32", "bf16", "int8" or, on a GPU, "fp8". speculation: "none" or "ngram" (prompt lookup). threads:
    worker threads.
    """

    kv_cache: str | None = None
    speculation: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.kv_cache is not None:
            choose("kv_cache", self.kv_cache, KV_CACHES)
        if self.speculation is not None:
            choose("speculation", self.speculation, SPECULATIONS)
        if self.threads is not None and (not is_int(self.threads) or self.threads < 1):
            raise RecipeError(f"threads is {self.threads!r}, expected a whole number of at least 1")

    @staticmethod
    def from_dict(data: object, name: str = "run") -> "Run":
        """From plain data, called `name` in errors. Raises RecipeError on anything unknown."""
        return build(Run, name, data)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Text that methods look at. text: a file, a folder of text files, or a data set's name on the Hugging Face hub;
    None: the model writes it itself. num_sequences of sequence_len tokens each are taken, evenly over the text."""

    text: str | None = None
    num_sequences: int = 128
    sequence_len: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        string("text", self.text, TEXT)
        count("num_sequences", self.num_sequences)
        count("sequence_len", self.sequence_len, 2)
        count("seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps in order, how to run the result, and the text that methods look at. No steps leave the model as it is.
    Each part may be given as plain data too."""

    steps: tuple[Step, ...] = ()
    run: Run = field(default_factory=Run)
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        if not isinstance(self.steps, list | tuple):
            raise RecipeError(f"steps is {type(self.steps).__name__}, expected a list of steps")
        object.__setattr__(self, "steps", tuple(map(_step, self.steps)))
        for key, kind in (("run", Run), ("calibration", Calibration)):
            if not isinstance(value := getattr(self, key), kind):
                object.__setattr__(self, key, build(kind, key, value))

    def to_dict(self) -> dict[str, Any]:
        """Plain data of what differs from the defaults; `from_dict` gives the same recipe back."""
        data: dict[str, Any] = {"steps": [{step_name(step): _plain(step)} for step in self.steps]}
        for key in ("run", "calibration"):
            if part := _plain(getattr(self, key)):
                data[key] = part
        return data

    @staticmethod
    def from_dict(data: object) -> "Recipe":
        """A recipe from plain data. Raises RecipeError on anything unknown, with the nearest known name."""
        top = mapping("a recipe", data)
        known_keys("recipe", top, ("steps", "run", "calibration"))
        return Recipe(**{key: value for key, value in top.items() if value is not None})  # a key without a value

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=120)

    @staticmethod
    def from_yaml(text: str) -> "Recipe":
        try:
            data = yaml.load(text, _Loader)
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
        if not isinstance(source, str | Path):
            raise RecipeError(
                f"a recipe is {type(source).__name__}, expected a Recipe (which takes a list of steps), plain data, "
                "a preset's name or a YAML file"
            )
        known = presets()
        if str(source) in known:
            return known[str(source)]
        path = Path(source)
        if source and path.is_dir():  # Path("") is the current folder
            path = path / "recipe.yaml"
            if not path.is_file():
                raise RecipeError(f"folder {source} has no recipe.yaml: name a preset, a YAML file or a tuned folder")
        if not path.is_file():
            raise RecipeError(f"no preset and no file is named '{source}'{did_you_mean(str(source), known)}")
        try:
            return Recipe.from_yaml(path.read_text(encoding="utf-8"))
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"cannot read recipe {path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML as users know it: 1e-4 is a number, 2:4 is text, and a key stands once. YAML 1.1 wants 1.0e-4, counts 2:4 in
    sixties, and lets the last of equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in found:
                raise RecipeError(f"key '{key.value}' stands twice, again on line {key.start_mark.line + 1}: keep one")
            found.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
for _first in "-+0123456789":  # in front of YAML's own: the first that matches is taken
    _Loader.yaml_implicit_resolvers[_first].insert(0, ("tag:yaml.org,2002:str", re.compile(r"[-+]?[\d_]+(:[\d_.]+)+$")))


def presets() -> dict[str, Recipe]:
    """The named recipes: those that round, which need no text, and those of methods."""
    return rounding_presets() | method_presets()


def method_presets() -> dict[str, Recipe]:
    """Recipes of methods that look at text, in the names of their field: w4a16 is 4-bit weights and 16-bit activations.

    Head and embedding stay as they are, so that Transformers and vLLM run the folders too.
    """
    gptq = Quantize("int4", 128, method="gptq", act_order=True, fallback="int8")
    steps: dict[str, tuple[Step, ...]] = {
        "w4a16-gptq": (gptq,),
        "w4a16-awq": (Quantize("int4", 128, symmetric=False, method="awq", fallback="int8"),),
        "w4a8-rotate-gptq": (Rotate(), replace(gptq, activations="int8")),
        "w8a8-smoothquant": (Smooth(0.5), Quantize("int8", 0, activations="int8")),
        "w8a8-gptq": (Smooth(0.5), Quantize("int8", 0, method="gptq", activations="int8")),
        "fp8-dynamic": (Quantize("fp8", activations="fp8"),),
        "fp8-static": (Quantize("fp8", activations="fp8-static"),),
        "2of4-sparsegpt": (Prune(pattern="2:4"),),
        "2of4-sparsegpt-int8": (Prune(pattern="2:4"), Quantize("int8", 0, method="gptq")),
        "lowrank-svd-llm": (Factorize(keep=0.8),),
        "prune-width-distill": (Shrink(neurons=0.5), Distill()),
    }
    return {name: Recipe(found) for name, found in steps.items()}


def rounding_presets() -> dict[str, Recipe]:
    """One format for every matrix, or int4 layers with an int8 head and embedding (`-head8`)."""
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


def _step(item: object) -> Step:
    if type(item) in STEPS.values():
        return item  # type: ignore[return-value]
    if isinstance(item, str):
        raise RecipeError(f"a step is '{item}', expected its name and values, such as quantize: {{format: int8}}")
    data = mapping("a step", item)
    if len(data) != 1:
        raise RecipeError(f"a step has {len(data)} names, expected one, such as quantize: {{format: int8}}")
    name, body = next(iter(data.items()))
    if name not in STEPS:
        raise RecipeError(f"unknown step '{name}'{did_you_mean(str(name), STEPS)}")
    return build(STEPS[name], str(name), {} if body is None else body)


def _plain(item: Any) -> dict[str, Any]:
    """What differs from the defaults; the format and targets of quantize are said all the same."""
    default = {key.name: key.default for key in fields(item)}
    named = ("format", "targets") if isinstance(item, Quantize) else ()
    data = {key: value for key, value in asdict(item).items() if key in named or getattr(item, key) != default[key]}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}
