"""Recipes: the same in Python and YAML, refused with a useful line, resolved against an architecture."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.compress.plan import reads_text, resolve
from hasten.compress.targets import describe, matrix_shapes
from hasten.errors import RecipeError
from hasten.model.formats import Format
from hasten.model.spec import Layer, ModelSpec
from hasten.recipe import KV_CACHES, SPECULATIONS, Calibration, Recipe, Run, presets, rounding_presets
from hasten.steps import (
    KINDS,
    STEPS,
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
)


def spec(tied: bool = True, gated: bool = True, intermediate: int = 256, hidden: int = 128) -> ModelSpec:
    return ModelSpec(
        family="llama", vocab_size=96, hidden_size=hidden, max_position=512,
        layers=(Layer(4, 2, 32, intermediate),) * 3, ropes=(),
        norm="rms", norm_eps=1e-5, norm_offset=0, pre_norm=True, post_norm=False, parallel_residual=False,
        qk_norm="none", activation="silu", gated_mlp=gated, learned_positions=False, attention_scale=1.0,
        attention_softcap=0, final_softcap=0, embedding_scale=1, residual_scale=1, logit_scale=1, tied_head=tied,
        dtype="bf16",
    )  # fmt: skip


names = st.lists(st.sampled_from(["Linear", "head", "layers.0.q", "re:.*down", "layers.*.up"]), max_size=3)
quantizes = st.builds(
    Quantize,
    st.sampled_from(["int8", "int4"]),
    st.sampled_from([None, 0, 32, 64, 128]),
    targets=names.filter(bool),
    ignore=names,
    fallback=st.sampled_from([None, "int8"]),
)
runs = st.builds(
    Run,
    st.sampled_from([None, *KV_CACHES]),
    st.sampled_from([None, *SPECULATIONS]),
    st.none() | st.integers(1, 64),
)


@given(st.builds(Recipe, st.lists(quantizes, max_size=3).map(tuple), runs))
def test_yaml_and_back(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_numbers_with_an_exponent_alone_are_numbers() -> None:
    for text, value in (("1e-4", 1e-4), ("2E-3", 2e-3), ("5.e-1", 0.5), (".5e-1", 0.05), ("1.5e-05", 1.5e-5)):
        assert Recipe.from_yaml(f"steps: [{{finetune: {{learning_rate: {text}}}}}]").steps == (
            Finetune(learning_rate=value),
        )
    assert Recipe.from_yaml("calibration: {text: e5}").calibration.text == "e5"


def test_a_learning_rate_that_is_not_given_is_the_methods() -> None:
    assert (Recover().rate, Recover("lora").rate, Recover("lora", learning_rate=3e-3).rate) == (1e-4, 1e-3, 3e-3)


def test_every_step_round_trips() -> None:
    schedule = Gradual(final_sparsity=0.5, begin_step=10, end_step=100)
    steps = (
        Rotate(seed=3), Shrink(heads=0.5, layers=0.1), Finetune(steps=200, sparsity=schedule),
        Distill(teacher="x", loss="reverse-kl", hidden=1.0, layer_map=((0, 1),)),
        Factorize(keep=0.6), SplitExperts(8, 2, "kmeans"),
        Prune(pattern="2:4", targets=("mlp",)), Recover("lora", rank=4), Smooth(0.7),
        Quantize("int4", method="gptq", act_order=True, bits=3), QuantizeKv(),
    )  # fmt: skip
    assert {type(step) for step in steps} == set(STEPS.values())
    recipe = Recipe(steps, calibration=Calibration("wiki.txt", 32))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_pattern_needs_no_quotes_and_other_numbers_stay_numbers() -> None:
    """YAML 1.1 counts 2:4 in sixties."""
    assert Recipe.from_yaml("steps: [{prune: {pattern: 2:4}}]").steps == (Prune(pattern="2:4"),)
    assert Recipe.from_yaml("calibration: {seed: 124, text: 12:30:05}").calibration == Calibration("12:30:05", seed=124)


def test_plain_data_is_a_recipe_in_python_too() -> None:
    parts = {"run": {"kv_cache": "int8"}, "calibration": {"text": "books.txt"}}
    recipe = Recipe([{"quantize": {"format": "int4"}}, Smooth()], **parts)  # type: ignore[arg-type, list-item]
    assert recipe == Recipe((Quantize("int4"), Smooth()), Run("int8"), Calibration("books.txt"))
    assert recipe == Recipe.load({"steps": list(recipe.steps), **parts})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Recipe(("int8",)), "a step is 'int8', expected its name and values, such as quantize: {format: int8}"),  # type: ignore[arg-type]
        (lambda: Recipe((7,)), "a step is int, expected names and values"),  # type: ignore[arg-type]
        (lambda: Recipe(Quantize()), "steps is Quantize, expected a list of steps"),  # type: ignore[arg-type]
        (lambda: Recipe(run={"threads": 0}), "threads is 0"),  # type: ignore[arg-type]
        (lambda: Recipe(run=8), "run is int, expected names and values"),  # type: ignore[arg-type]
        (lambda: Recipe(calibration={"txt": "a"}), "unknown key 'txt' in calibration: did you mean 'text'?"),  # type: ignore[arg-type]
        (lambda: Recipe(calibration="a.txt"), "calibration is str, expected names and values"),  # type: ignore[arg-type]
        (lambda: Recipe.load([Quantize()]), "a recipe is list, expected a Recipe (which takes a list of steps)"),  # type: ignore[arg-type]
        (lambda: Recipe.load(Quantize()), "a recipe is Quantize, expected a Recipe"),  # type: ignore[arg-type]
        (lambda: Recipe.load(None), "a recipe is NoneType, expected a Recipe"),  # type: ignore[arg-type]
        (lambda: Recipe.load(5), "a recipe is int, expected a Recipe"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_recipe_in_python_is_refused_in_a_line(made: Callable[[], Recipe], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        made()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", presets())
def test_presets_load_by_name_and_round_trip(name: str) -> None:
    recipe = Recipe.load(name)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert resolve(recipe, spec(hidden=512)).spec.hidden_size == 512


@pytest.mark.parametrize("name", rounding_presets())
def test_rounding_presets_say_what_they_do(name: str) -> None:
    recipe = Recipe.load(name)
    plan = resolve(recipe, spec())
    wide = resolve(recipe, spec(hidden=512))
    assert set(plan.formats) == set(wide.formats) == set(matrix_shapes(spec()))
    assert describe(wide.formats["layers.1.down"]) == name.removesuffix("-head8")
    assert describe(wide.formats["embed"]) == ("int8" if name.endswith("-head8") else name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: []", r"unknown key 'stepz' in recipe: did you mean 'steps'\?"),
        ("steps: [{quantise: {}}]", r"unknown step 'quantise': did you mean 'quantize'\?"),
        ("steps: [{quantize: {fromat: int8}}]", r"unknown key 'fromat' in quantize: did you mean 'format'\?"),
        ("steps: [{quantize: {format: int9}}]", r"format is 'int9': did you mean 'int8'\?.*int4"),
        ("steps: [{quantize: {group_size: 48}}]", "group_size is 48, expected 0"),
        ("steps: [{quantize: {group_size: true}}]", "group_size is True"),
        ("steps: [{quantize: {format: bf16, group_size: 32}}]", "bf16 has no groups"),
        ("steps: [{quantize: {symmetric: false}}]", "symmetric: false is for int4"),
        ("steps: [{quantize: {symmetric: 3}}]", "symmetric is 3"),
        ("steps: [{quantize: {targets: 3}}]", "targets is 3, expected a list"),
        ("steps: [{quantize: {targets: []}}]", "targets is empty"),
        ("steps: [{quantize: {}, prune: {}}]", "a step has 2 names"),
        ("steps: [{quantize: {method: gtpq}}]", r"method is 'gtpq': did you mean 'gptq'\?"),
        ("steps: [{quantize: {format: fp8, method: gptq}}]", "method gptq is for int8 and int4, found format fp8"),
        ("steps: [{quantize: {act_order: true}}]", "act_order is for method gptq, found rtn"),
        ("steps: [{quantize: {format: int4, bits: 2}}]", "bits is 2, expected 3 or 4 with int4"),
        ("steps: [{quantize: {format: fp8, activations: int8}}]", "activations int8 do not go with format fp8"),
        ("steps: [{quantize: {threshold: 2}}]", "threshold is 2, expected a number of 0 to 1"),
        ("steps: [{prune: {pattern: '2:4', sparsity: 0.6}}]", r"sparsity is 0.6, pattern 2:4 means 0.5"),
        ("steps: [{prune: {sparsity: 1}}]", "sparsity is 1, expected a number above 0 and below 1"),
        ("steps: [{shrink: {}}]", "shrink removes nothing"),
        ("steps: [{split_experts: {active: 32}}]", "active is 32, expected at most experts, which is 16"),
        ("steps: [{finetune: {sparsity: {final_sparsity: 0.5}}}]", "missing 2 required .*'begin_step' and 'end_step'"),
        ("steps: [{finetune: {sparsity: 0.5}}]", "sparsity is float, expected names and values"),
        ("steps: [{finetune: {text: 5}}]", "text is 5, expected a file, a folder or a data set's name"),
        ("steps: [{recover: {text: [a]}}]", r"text is \['a'\], expected a file"),
        ("steps: [{distill: {teacher: 7}}]", "teacher is 7, expected a model's folder or name"),
        ("steps: [{distill: {student: 7}}]", "student is 7, expected a config.json"),
        ("steps: [{distill: {logs: true}}]", "logs is True, expected a folder"),
        ("steps: [{distill: {beta: 0.2}}]", "beta is 0.2, and belongs to loss .jensen-shannon.: remove it"),
        (
            "steps: [{distill: {layer_map: [[0, 1, 2]], hidden: 1}}]",
            "expected pairs of the student's and the teacher's",
        ),
        ("steps: [{distill: {layer_map: [[0, -1]], hidden: 1}}]", "layer_map is .*, expected pairs"),
        ("steps: [{distill: {layer_map: [[0, 1], [0, 2]], hidden: 1}}]", "expected each of the student's layers once"),
        ("steps: [{distill: {layer_map: [[0, 1]]}}]", "belongs to a weight of hidden or attention: remove it"),
        ("steps: [{distill: {student_share: 1}}]", "student_share is 1, and belongs to samples .student."),
        ("steps: [{recover: {rank: 8}}]", "rank is 8, and belongs to method .lora."),
        ("steps: [{recover: {method: lora, parts: [norms]}}]", "parts is .*, and belongs to method .block."),
        ("steps: [{smooth: {strenght: 1}}]", r"unknown key 'strenght' in smooth: did you mean 'strength'\?"),
        ("calibration: {txt: a}", r"unknown key 'txt' in calibration: did you mean 'text'\?"),
        ("calibration: {num_sequences: 0}", "num_sequences is 0, expected a whole number of at least 1"),
        ("steps: 3", "steps is int"),
        ("steps: {}", "steps is dict, expected a list of steps"),
        ("steps: [rotate]", "a step is 'rotate', expected its name and values, such as quantize: {format"),
        ("steps: [{rotate: 0}]", "rotate is int, expected names and values"),
        (
            "steps: [{factorize: {keep: 0.9, rank: 8}}]",
            "keep is 0.9 and rank is 8, and both say what stays: remove one",
        ),
        ("steps: []\nrun: {}\nsteps: [{rotate: {}}]", "key 'steps' stands twice, again on line 3: keep one"),
        ("steps:\n- quantize:\n    format: int8\n    format: int4", "key 'format' stands twice, again on line 4"),
        ("run: {kv_cache: int4}", "kv_cache is 'int4'"),
        ("run: {thread: 2}", r"did you mean 'threads'\?"),
        ("run: {threads: 0}", "threads is 0"),
        ("[1, 2]", "a recipe is list"),
        ("{", "not YAML"),
    ],
)
def test_a_wrong_recipe_says_what_was_meant(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_yaml(text)
    assert "\n" not in str(caught.value)


def test_load_takes_files_and_names_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: [{quantize: {format: int4}}]")
    assert Recipe.load(tmp_path) == Recipe.load(tmp_path / "recipe.yaml") == Recipe((Quantize("int4"),))
    with pytest.raises(RecipeError, match=r"named 'int4-g33': did you mean 'int4-g3"):
        Recipe.load("int4-g33")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        RecipeError, match=r"^folder \S+empty has no recipe.yaml: name a preset, a YAML file or a tuned"
    ):
        Recipe.load(tmp_path / "empty")
    with pytest.raises(RecipeError, match="no preset and no file is named ''"):
        Recipe.load("")


def test_later_steps_override() -> None:
    recipe = Recipe((Quantize("int4", 32, targets=("Linear", "head")), Quantize("int8", targets=("layers.1.*",))))
    formats = resolve(recipe, spec(tied=False)).formats
    assert formats["layers.0.q"] == formats["head"] == Format("int4", 32)
    assert formats["layers.1.down"] == Format("int8", 32)
    assert "embed" not in formats


def test_int8_takes_groups_of_32_in_narrow_models_where_they_fit() -> None:
    def found(hidden: int, group: int | None = None) -> dict[str, Format]:
        return resolve(Recipe((Quantize("int8", group),)), spec(hidden=hidden, intermediate=172)).formats

    assert {fmt for name, fmt in found(256).items() if "down" not in name} == {Format("int8", 32)}
    assert found(256)["layers.0.down"] == Format("int8")  # 172 inputs
    assert set(found(288).values()) == set(found(256, 0).values()) == {Format("int8")}


def test_targets_by_class_name_glob_and_expression() -> None:
    def found(*targets: str, **options: object) -> set[str]:
        return set(resolve(Recipe((Quantize("int8", targets=targets, **options),)), spec()).formats)  # type: ignore[arg-type]

    assert found("attention") == {f"layers.{i}.{m}" for i in range(3) for m in "qkvo"}
    assert found("mlp", ignore=("layers.0.*",)) == {f"layers.{i}.{m}" for i in (1, 2) for m in ("gate", "up", "down")}
    assert found("head") == found("embedding") == {"embed"}
    assert found("layers.2.o", r"re:layers\.[01]\.down") == {"layers.2.o", "layers.0.down", "layers.1.down"}
    assert found("Linear") == found("attention", "mlp")


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'layers.3.q' matches no matrix .* did you mean 'layers"):
        resolve(Recipe((Quantize(targets=("layers.3.q",)),)), spec())
    with pytest.raises(RecipeError, match="'mpl' matches no matrix"):
        resolve(Recipe((Quantize(targets=("mpl",)),)), spec())
    with pytest.raises(RecipeError, match="gate"):
        resolve(Recipe((Quantize(targets=("layers.0.gate",)),)), spec(gated=False))
    with pytest.raises(RecipeError, match="not a regular expression"):
        resolve(Recipe((Quantize(targets=("re:(",)),)), spec())


def test_a_group_that_does_not_divide_names_layer_and_choices() -> None:
    odd = spec(intermediate=160)
    with pytest.raises(RecipeError, match=r"layers.0.down has 160 inputs, .* 64: use group_size 32 or 0 \(0 is one"):
        resolve(Recipe((Quantize("int4", 64),)), odd)
    plan = resolve(Recipe((Quantize("int4", 64, fallback="int8"),)), odd)
    assert plan.formats["layers.0.down"] == Format("int4", 32)
    assert plan.formats["layers.0.up"] == Format("int4", 64)
    assert plan.notes == ("layers.*.down (3): int4-g32 instead of int4-g64",)
    plan = resolve(Recipe((Quantize("int4", 32, fallback="int8"),)), spec(intermediate=172))
    assert plan.formats["layers.0.down"] == Format("int8")
    assert plan.notes == ("layers.*.down (3): int8 instead of int4-g32",)


def test_group_sizes_that_are_advised_fit_every_target() -> None:
    wide = spec(hidden=96, intermediate=176)  # 32 divides 96 and 128, not 176; 64 does not divide 96
    for group in (32, 64, 128):
        with pytest.raises(
            RecipeError, match=r"use group_size 0 \(0 is .*, or set fallback: int8 in a recipe file"
        ) as caught:
            resolve(presets()[f"int4-g{group}"], wide)
        assert "compress --show PRESET" in str(caught.value)
    resolve(Recipe((Quantize("int4", 0),)), wide)
    with pytest.raises(RecipeError, match=r"layers.0.q has 96 inputs, not a multiple of group_size 64: set fallback"):
        resolve(Recipe((Quantize("int4", 64),)), spec(hidden=96, intermediate=175))


def test_a_tied_embedding_that_the_heads_step_takes_along_is_noted() -> None:
    def notes(*steps: Quantize, tied: bool = True) -> tuple[str, ...]:
        return resolve(Recipe(steps), spec(tied)).notes

    head, embedding = Quantize("int4", targets=("head",)), Quantize("int8", targets=("embedding",))
    line = "head and embedding are one matrix in this model"
    assert notes(embedding, head) == (f"{line}: embedding is int4-g32 too, instead of int8-g32",)
    assert notes(head, embedding) == (f"{line}: head is int8-g32 too, instead of int4-g32",)
    assert notes(embedding, head, head) == notes(embedding, head)
    both = replace(head, targets=("head", "embedding"))
    for steps in (
        (both,),
        (embedding, both),
        (embedding, replace(head, format="int8")),
        (embedding, head, both),
        (embedding, head, replace(head, format="int8")),
    ):
        assert not notes(*steps)
    assert not notes(embedding, head, tied=False)


def test_what_reads_the_calibration_text() -> None:
    own = {"text": "own.txt"}
    deaf = (
        Quantize(), Quantize("fp8", activations="fp8"), Rotate(), Shrink(neurons=0.5, rank_by="magnitude"),
        Finetune(**own), Distill(**own), Recover("lora", **own),
    )  # fmt: skip
    assert not reads_text(deaf)
    for step in (
        Quantize(method="gptq"), Quantize(threshold=0.1), Quantize("fp8", activations="fp8-static"), QuantizeKv(),
        Shrink(neurons=0.5), Shrink(layers=0.4, rank_by="magnitude"), Smooth(), Prune(), Factorize(), SplitExperts(),
        Finetune(), Finetune(text="ready.npy"), Distill(), Recover(), Recover("lora"),
    ):  # fmt: skip
        assert reads_text((*deaf, step)), step


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (Recover("lora", rank=1000), r"rank is 1000, layers\.0\.q is a matrix of \(128, 128\): at most 128"),
        (Finetune(sequence_len=4096), "training sequences have 4096 tokens, the model at most 512: lower sequence_len"),
        (Distill(sequence_len=4096), "training sequences have 4096 tokens, the model at most 512"),
        (Recover("lora", sequence_len=4096), "training sequences have 4096 tokens, the model at most 512"),
        (Finetune(text="other.npy"), "text is other.npy: name ready tokens in calibration, or give finetune a text"),
        (Distill(hidden=1.0, layer_map=((3, 0),)), "layer_map names the student's layer 3, it has 3"),
        (
            Distill(hidden=1.0, keep_layers=(0, 2), layer_map=((1, 3),)),
            "layer_map names the teacher's layer 3, it has 3",
        ),
    ],
)
def test_what_a_model_cannot_do_is_known_before_the_work(last: Step, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve(Recipe((Prune(), last), calibration=Calibration("books.txt")), spec())


def test_ready_sequences_are_as_long_as_the_calibrations() -> None:
    for text in (None, "tokens.npy"):
        recipe = Recipe((Finetune(sequence_len=4096),), calibration=Calibration(text, sequence_len=128))
        resolve(recipe, spec())
    written = Recipe((Distill(samples="teacher", sequence_len=4096),), calibration=Calibration(sequence_len=128))
    with pytest.raises(RecipeError, match="training sequences have 4096 tokens"):
        resolve(written, spec())


@pytest.mark.parametrize("last", [Shrink(neurons=0.5), Finetune(), Distill(), Recover("lora")], ids=str)
def test_steps_that_take_unquantised_models(last: Step) -> None:
    narrow = dict.fromkeys(matrix_shapes(spec()), Format("int8"))
    for first in ((), (Smooth(),), (Prune(targets=("attention",)),)):
        if first and isinstance(last, Shrink) and isinstance(first[0], Prune):
            continue  # their order is refused
        with pytest.raises(RecipeError, match=r"is quantised, \w+ takes unquantised models: start from the original"):
            resolve(Recipe((*first, last)), spec(), narrow)
    resolve(Recipe((Rotate(), last)), spec(), narrow)  # which stores every matrix whole
    resolve(Recipe((Prune(targets=("mlp",)), Finetune())), spec(), {"layers.0.up": Format("int8")})
    resolve(Recipe((Finetune(fresh=True), last)), spec(), narrow)


def test_less_than_the_lowest_ranks_is_refused() -> None:
    lowest = resolve(Recipe((Factorize(keep=0.112),)), spec())
    assert lowest.factorized["layers.0.q"] == 8
    with pytest.raises(RecipeError, match=r"keep is 0.02, and the lowest ranks store 0.1111 .*: at least 0.112, or"):
        resolve(Recipe((Factorize(keep=0.02),)), spec())
    resolve(Recipe((Factorize(rank=1),)), spec())


def test_zeros_that_make_nothing_faster_are_noted() -> None:
    schedule = Gradual(0.5, 0, 10, targets=("mlp",))
    for step, count in ((Prune(), 21), (Finetune(sparsity=schedule), 9)):
        (note,) = resolve(Recipe((step,)), spec()).notes
        assert note.startswith(f"zeros of {count} pruned matrices are stored and multiplied like other numbers")
    assert not resolve(Recipe((Prune(pattern="2:4"),)), spec()).notes
    assert not resolve(Recipe((Prune(0.2), Prune(pattern="2:4"))), spec()).notes


def test_fields_agree_with_formats() -> None:
    """Every kind that a recipe accepts is a kind of Format."""
    for kind in KINDS:
        assert replace(Quantize(), format=kind).format == Format(kind).kind  # type: ignore[arg-type]
