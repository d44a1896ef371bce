"""Steps: what a recipe can do to a model, each a frozen dataclass that checks itself as it is made.

Plain data: the same in Python, YAML and a saved folder. Knows no model (compress/plan.py checks a step against one) and
no method (compress/ and train/ carry steps out). `targets` and `ignore` are names as recipe.py's docstring has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hasten.checks import build, choose, count, flag, is_int, names, number, string
from hasten.errors import RecipeError

KINDS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
METHODS = ("rtn", "gptq", "awq")
ACTIVATIONS = ("int8", "fp8", "fp8-static")
PATTERNS = ("unstructured", "2:4")
LINEAR = ("Linear",)
TEXT = "a file, a folder or a data set's name"


@dataclass(frozen=True, slots=True)
class Quantize:
    """Store the targeted matrices in `format`.

    group_size: input columns that share a scale; 0 is one scale a row. None means 32 for int4; for int8 32 in narrow
    models (up to 256 hidden units) and 0 in others.
    symmetric: False stores a zero point beside each scale; int4 only.
    fallback: "int8" lets a matrix whose inputs the group does not divide take the nearest format that fits (a smaller
    group, else int8 with one scale a row); None makes that an error.
    method: "rtn" rounds to nearest with the scale of least squared error; "gptq" and "awq" use calibration text.
    act_order: GPTQ takes columns by falling size of their inputs. damping: added to the diagonal of GPTQ's Hessian, as
    a share of its mean.
    activations: how inputs of the product are quantised, written into the folder: "int8" or "fp8" as they come,
    "fp8-static" with scales from calibration text; None says nothing of them.
    bits: 3 restricts int4's codes to eight levels (stored as int4 all the same).
    threshold: the share of quality (rise of bits per byte, 0-1) that may be lost: each matrix takes the cheapest format
    that measured sensitivity allows, `format` or a wider one.
    """

    format: str = "int8"
    group_size: int | None = None
    symmetric: bool = True
    targets: tuple[str, ...] = LINEAR
    ignore: tuple[str, ...] = ()
    fallback: str | None = None
    method: str = "rtn"
    act_order: bool = False
    damping: float = 0.01
    activations: str | None = None
    bits: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        choose("format", self.format, KINDS)
        if self.group_size is not None:
            _check_group(self.format, self.group_size)
        flag("symmetric", self.symmetric)
        if not self.symmetric and self.format != "int4":
            raise RecipeError(f"symmetric: false is for int4, found it with {self.format}: remove it")
        if self.fallback is not None:
            choose("fallback", self.fallback, ("int8",))
        _check_names(self)
        choose("method", self.method, METHODS)
        if self.method != "rtn" and self.format not in ("int8", "int4"):
            raise RecipeError(f"method {self.method} is for int8 and int4, found format {self.format}: use rtn")
        flag("act_order", self.act_order)
        if self.act_order and self.method != "gptq":
            raise RecipeError(f"act_order is for method gptq, found {self.method}: remove it")
        number("damping", self.damping, 0, 1, closed=False)
        self._check_activations()
        if self.bits is not None and (self.bits, self.format) not in ((3, "int4"), (4, "int4"), (8, "int8")):
            raise RecipeError(f"bits is {self.bits!r}, expected 3 or 4 with int4, or 8 with int8, found {self.format}")
        if self.threshold is not None:
            number("threshold", self.threshold, 0, 1)
            if self.format not in ("int8", "int4"):
                raise RecipeError(f"threshold chooses among int8 and int4, found format {self.format}: remove it")

    def _check_activations(self) -> None:
        if self.activations is None:
            return
        choose("activations", self.activations, ACTIVATIONS)
        integers = self.activations == "int8"
        if integers != (self.format in ("int8", "int4")) or self.format not in ("int8", "int4", "fp8"):
            raise RecipeError(
                f"activations {self.activations} do not go with format {self.format}: "
                "int8 goes with int8 and int4, fp8 and fp8-static with fp8"
            )


@dataclass(frozen=True, slots=True)
class QuantizeKv:
    """Scales for keys and values stored in `format`, one a layer each, from calibration text."""

    format: str = "fp8"

    def __post_init__(self) -> None:
        choose("format", self.format, ("fp8",))


@dataclass(frozen=True, slots=True)
class Smooth:
    """SmoothQuant (Xiao et al. 2022): outliers of activations move into the weights, folded into norms.

    strength: 0 leaves all in the activations, 1 moves all to the weights (the paper's alpha).
    """

    strength: float = 0.5

    def __post_init__(self) -> None:
        number("strength", self.strength, 0, 1)


@dataclass(frozen=True, slots=True)
class Rotate:
    """QuaRot (Ashkboos et al. 2024): the residual stream, and each head's values, are turned by orthogonal matrices
    that are folded into the weights, so that no channel stands out. The model computes the same."""

    seed: int = 0

    def __post_init__(self) -> None:
        count("seed", self.seed, 0)


@dataclass(frozen=True, slots=True)
class Prune:
    """Set a share of each targeted matrix to zero.

    pattern: "2:4" keeps two of each four successive inputs, and needs sparsity 0.5. method: "magnitude", "wanda"
    (Sun et al. 2023) or "sparsegpt" (Frantar & Alistarh 2023).
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"
    method: str = "sparsegpt"
    targets: tuple[str, ...] = LINEAR
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number("sparsity", self.sparsity, 0, 1, closed=False)
        choose("pattern", self.pattern, PATTERNS)
        if self.pattern == "2:4" and self.sparsity != 0.5:
            raise RecipeError(f"sparsity is {self.sparsity}, pattern 2:4 means 0.5: remove one of them")
        choose("method", self.method, ("magnitude", "wanda", "sparsegpt"))
        _check_names(self)


@dataclass(frozen=True, slots=True)
class Shrink:
    """Remove whole structures, so that shapes shrink: the share of attention heads (key-value groups), MLP neurons,
    hidden units and layers that goes.

    Layers go by block influence (Men et al. 2024), others as `rank_by` says: by what they give on calibration text
    ("activation", Muralidharan et al. 2024), by the loss's gradient ("gradient", Molchanov et al. 2019; takes the whole
    model into memory), or by their weights ("magnitude", which needs no text). Numbers that stay are multiples that
    processors like. With text, what stays is fitted to what all gave.
    targets, ignore: a layer loses heads where its `o` is targeted, neurons where its `down` is, and may go where
    anything of it is; so layers can have widths of their own.
    """

    heads: float = 0.0
    neurons: float = 0.0
    hidden: float = 0.0
    layers: float = 0.0
    rank_by: str = "activation"
    targets: tuple[str, ...] = LINEAR
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_names(self)
        for key in ("heads", "neurons", "hidden", "layers"):
            value = getattr(self, key)
            number(key, value, 0, 1)
            if value == 1:
                raise RecipeError(f"{key} is {value!r}: that removes all of them, expected less than 1")
        choose("rank_by", self.rank_by, ("activation", "gradient", "magnitude"))
        if not (self.heads or self.neurons or self.hidden or self.layers):
            raise RecipeError("shrink removes nothing: give a share of heads, neurons, hidden or layers")


@dataclass(frozen=True, slots=True)
class Factorize:
    """Replace the targeted matrices by products of two thin ones.

    keep: share of the targets' parameters that stays, given to layers by need; or rank, the same for each. method:
    "svd" or "svd-llm" (Wang et al. 2024: whitened by the inputs).
    """

    keep: float = 0.8
    rank: int | None = None
    method: str = "svd-llm"
    targets: tuple[str, ...] = LINEAR
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        number("keep", self.keep, 0, 1, closed=False)
        if self.rank is not None:
            count("rank", self.rank)
            if self.keep != type(self).__dataclass_fields__["keep"].default:
                raise RecipeError(f"keep is {self.keep!r} and rank is {self.rank}, and both say what stays: remove one")
        choose("method", self.method, ("svd", "svd-llm"))
        _check_names(self)


@dataclass(frozen=True, slots=True)
class SplitExperts:
    """Split each MLP into `experts` groups of neurons, of which a router runs `active` a token (Zhang et al. 2022).

    method: "spectral" clusters neurons by the Laplacian of their co-activation, "kmeans" by their weights, "random"
    does not look.
    """

    experts: int = 16
    active: int = 4
    method: str = "spectral"

    def __post_init__(self) -> None:
        count("experts", self.experts, 2)
        count("active", self.active)
        if self.active > self.experts:
            raise RecipeError(f"active is {self.active}, expected at most experts, which is {self.experts}")
        choose("method", self.method, ("spectral", "kmeans", "random"))


@dataclass(frozen=True, slots=True)
class Gradual:
    """A schedule of sparsity during training (Zhu & Gupta 2017): from initial_sparsity at begin_step to final_sparsity
    at end_step, along a cubic curve, masks renewed `every` so many steps, by magnitude.

    pattern: "2:4" prunes whole groups of four inputs to two, those that lose least first; final_sparsity is 0.5.
    """

    final_sparsity: float
    begin_step: int
    end_step: int
    initial_sparsity: float = 0.0
    every: int = 10
    pattern: str = "unstructured"
    targets: tuple[str, ...] = LINEAR
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_names(self)
        number("initial_sparsity", self.initial_sparsity, 0, 1)
        number("final_sparsity", self.final_sparsity, 0, 1, closed=False)
        if self.initial_sparsity > self.final_sparsity:
            raise RecipeError(
                f"initial_sparsity is {self.initial_sparsity}, expected at most final_sparsity {self.final_sparsity}"
            )
        count("begin_step", self.begin_step, 0)
        count("end_step", self.end_step, self.begin_step + 1)
        count("every", self.every)
        choose("pattern", self.pattern, PATTERNS)
        if self.pattern == "2:4" and self.final_sparsity != 0.5:
            raise RecipeError(f"final_sparsity is {self.final_sparsity}, pattern 2:4 ends at 0.5")


@dataclass(frozen=True, slots=True)
class Training:
    """What every training has.

    text: a file, a folder or a data set's name; None is the recipe's calibration text. steps: of the optimiser, each of
    gradient_accumulation batches. warmup: share of them during which the learning rate rises; then it falls as
    `schedule` says. dropout: of embeddings and of what layers add, against learning a short text by heart. logs: a
    folder for TensorBoard. sparsity: a Gradual schedule. Weights that are zero in a pruned matrix, which is one with
    more than 1 % of zeros, stay zero.
    """

    text: str | None = None
    steps: int = 1000
    batch_size: int = 8
    sequence_len: int = 512
    learning_rate: float = 1e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.01
    dropout: float = 0.0
    gradient_accumulation: int = 1
    seed: int = 0
    logs: str | None = None
    sparsity: Gradual | None = None

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "gradient_accumulation"):
            count(key, getattr(self, key))
        count("sequence_len", self.sequence_len, 2)
        number("learning_rate", self.learning_rate, 0, 1, closed=False)
        number("warmup", self.warmup, 0, 1)
        choose("schedule", self.schedule, ("cosine", "linear", "constant"))
        number("weight_decay", self.weight_decay, 0, 10)
        number("dropout", self.dropout, 0, 0.9)
        count("seed", self.seed, 0)
        string("text", self.text, TEXT)
        string("logs", self.logs, "a folder")
        if self.sparsity is not None and not isinstance(self.sparsity, Gradual):
            object.__setattr__(self, "sparsity", build(Gradual, "sparsity", self.sparsity))
        if self.sparsity is not None and self.sparsity.end_step > self.steps:
            raise RecipeError(f"end_step is {self.sparsity.end_step}, expected at most steps, which is {self.steps}")


@dataclass(frozen=True, slots=True)
class Finetune(Training):
    """Train the weights on text. fresh: from random ones, in the model's shapes."""

    fresh: bool = False

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        flag("fresh", self.fresh)


@dataclass(frozen=True, slots=True)
class Distill(Training):
    """Train the weights to give what a teacher gives (Hinton et al. 2015).

    teacher: a model; None is the model as it was before the recipe. loss: divergence between the two distributions;
    beta: of "jensen-shannon", towards forward KL at 0 and reverse KL at 1. temperature: of both. weight: of the
    teacher's loss, the rest is the text's own. hidden, attention: weights of matching hidden states and attention in
    layers of like depth, or as layer_map says: pairs of a layer of the student and the teacher's that it learns from.
    samples: what is learned from: "text"; "teacher", which first writes texts (Kim & Rush 2016); or "student", which
    writes a share student_share of its batches itself (on-policy, Agarwal et al. 2023).
    student: where it is not the model as the steps before left it: a config.json, for random weights. keep_layers: the
    layers that the student takes of the model.
    """

    teacher: str | None = None
    loss: str = "forward-kl"
    beta: float = 0.5
    temperature: float = 1.0
    weight: float = 0.5
    hidden: float = 0.0
    attention: float = 0.0
    samples: str = "text"
    student_share: float = 0.5
    student: str | None = None
    keep_layers: tuple[int, ...] = ()
    layer_map: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        choose("loss", self.loss, ("forward-kl", "reverse-kl", "jensen-shannon"))
        number("beta", self.beta, 0, 1, closed=False)
        number("temperature", self.temperature, 0, 100, closed=False)
        for key in ("weight", "student_share"):
            number(key, getattr(self, key), 0, 1)
        for key in ("hidden", "attention"):
            number(key, getattr(self, key), 0, 1000)
        choose("samples", self.samples, ("text", "teacher", "student"))
        _belongs(self, "beta", 'loss "jensen-shannon"', self.loss == "jensen-shannon")
        _belongs(self, "student_share", 'samples "student"', self.samples == "student")
        string("teacher", self.teacher, "a model's folder or name")
        string("student", self.student, "a config.json")
        layers = self.keep_layers
        if not isinstance(layers, list | tuple) or not all(is_int(layer) and layer >= 0 for layer in layers):
            raise RecipeError(f"keep_layers is {layers!r}, expected numbers of layers such as [0, 2, 4]")
        if list(layers) != sorted(set(layers)):
            raise RecipeError(f"keep_layers is {list(layers)}, expected rising numbers, each once")
        object.__setattr__(self, "keep_layers", tuple(layers))
        if self.student is not None and layers:
            raise RecipeError("student and keep_layers both say what the student is: remove one of them")
        self._check_layer_map()

    def _check_layer_map(self) -> None:
        pairs = self.layer_map
        if not isinstance(pairs, list | tuple) or not all(map(_is_pair_of_layers, pairs)):
            raise RecipeError(
                f"layer_map is {pairs!r}, expected pairs of the student's and the teacher's layers such as "
                "[[0, 1], [1, 3]]"
            )
        object.__setattr__(self, "layer_map", tuple(tuple(pair) for pair in pairs))
        if len({student for student, _ in self.layer_map}) < len(self.layer_map):
            raise RecipeError(f"layer_map is {pairs!r}, expected each of the student's layers once")
        _belongs(self, "layer_map", "a weight of hidden or attention", bool(self.hidden or self.attention))


@dataclass(frozen=True, slots=True)
class Recover:
    """Win back what earlier steps lost: "block" fits each block to the original's outputs on calibration text, "lora"
    trains low-rank additions of `rank` (Hu et al. 2021) to all matrices of the layers and merges them. Pruned weights
    stay zero.

    learning_rate: None is 1e-4, and 1e-3 for lora, whose additions begin at zero. parts: what of a block is fitted:
    "weights", "biases", "norms". The rest is lora's, as in Distill: weight is that of the original's predictions, 0
    learns from the text alone.
    """

    method: str = "block"
    steps: int = 100
    learning_rate: float | None = None
    rank: int = 16
    parts: tuple[str, ...] = ("weights", "biases", "norms")
    text: str | None = None
    batch_size: int = 8
    sequence_len: int = 512
    weight: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", names("parts", self.parts))
        for part in self.parts:
            choose("parts", part, ("weights", "biases", "norms"))
        choose("method", self.method, ("block", "lora"))
        for key in ("steps", "rank", "batch_size"):
            count(key, getattr(self, key))
        if self.learning_rate is not None:
            number("learning_rate", self.learning_rate, 0, 1, closed=False)
        count("sequence_len", self.sequence_len, 2)
        string("text", self.text, TEXT)
        number("weight", self.weight, 0, 1)
        _belongs(self, "parts", 'method "block"', self.method == "block")
        for key in ("rank", "text", "batch_size", "sequence_len", "weight"):
            _belongs(self, key, 'method "lora"', self.method == "lora")
        count("seed", self.seed, 0)

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (1e-3 if self.method == "lora" else 1e-4)


Step = (
    Quantize | QuantizeKv | Smooth | Rotate | Prune | Shrink | Factorize | SplitExperts | Finetune | Distill | Recover
)
# A step's name in YAML. Its order here is that of a sensible recipe, of which factorize and prune exclude each other.
STEPS: Mapping[str, type[Step]] = {
    "rotate": Rotate,
    "shrink": Shrink,
    "finetune": Finetune,
    "distill": Distill,
    "smooth": Smooth,
    "factorize": Factorize,
    "split_experts": SplitExperts,
    "prune": Prune,
    "recover": Recover,
    "quantize": Quantize,
    "quantize_kv": QuantizeKv,
}


def step_name(step: Step) -> str:
    """A step's name in YAML."""
    return next(name for name, kind in STEPS.items() if type(step) is kind)


def _is_pair_of_layers(pair: object) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(is_int(layer) and layer >= 0 for layer in pair)


def _check_group(kind: str, group: object) -> None:
    if not is_int(group) or group not in (0, 32, 64, 128):
        raise RecipeError(f"group_size is {group!r}, expected 0 (one scale a row), 32, 64 or 128")
    if group and kind not in ("int8", "int4"):
        raise RecipeError(f"{kind} has no groups, found group_size {group}: remove it")


def _belongs(step: Any, key: str, where: str, fits: bool) -> None:
    """What would be passed over in silence is refused."""
    value = getattr(step, key)
    if not fits and value != type(step).__dataclass_fields__[key].default:
        raise RecipeError(f"{key} is {value!r}, and belongs to {where}: remove it")


def _check_names(step: Any) -> None:
    for key in ("targets", "ignore"):
        object.__setattr__(step, key, names(key, getattr(step, key)))
    if not step.targets:
        raise RecipeError("targets is empty: name at least one, such as Linear")
