"""Prune, Factorize, SplitExperts and Recover as steps of recipes on tiny models: what they leave, ranks, errors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_compress_strip import logits as reference_logits

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hasten import load_torch  # noqa: E402
from hasten.cli.inspect import model_facts  # noqa: E402
from hasten.compress.folder import compress  # noqa: E402
from hasten.compress.plan import resolve  # noqa: E402
from hasten.errors import RecipeError  # noqa: E402
from hasten.model import formats  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.tokenizer import Tokenizer  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import (  # noqa: E402
    Distill,
    Factorize,
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

WORDS = ["".join(np.random.default_rng(seed).choice(list("etaoinshrdlu"), seed % 7 + 1)) for seed in range(3000)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(WORDS[:2500]))
    return str(file)


def recipe(text: str, *steps: Step) -> Recipe:
    return Recipe(steps, calibration=Calibration(text, num_sequences=20, sequence_len=40))


def made(model: Path, wanted: Recipe, out: Path) -> Path:
    compress(model, wanted, out, device="cpu")
    return out


def logits(folder: Path) -> np.ndarray:
    checkpoint = open_checkpoint(folder)
    return reference_logits(checkpoint.spec, checkpoint.weights(), unseen(folder))


def unseen(folder: Path) -> list[int]:
    """Tokens that are not in the calibration text."""
    return Tokenizer(folder).encode(" ".join(WORDS[2500:]))[:48]


def numbers(folder: Path) -> dict[str, np.ndarray]:
    return {name: formats.dequantize(weight) for name, weight in open_checkpoint(folder).weights()}


@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_pruned_matrices_hold_their_zeros_and_the_rest_is_untouched(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    step = Prune(pattern="2:4", targets=("mlp", "layers.*.q"), ignore=("layers.0.*",))
    compress(model, recipe(text, step), tmp_path / "out", device="cpu")
    before, after = numbers(model), numbers(tmp_path / "out")
    for name, values in after.items():
        if name.startswith(("layers.1", "layers.2")) and name.endswith((".gate", ".up", ".down", ".q")):
            kept = (values.reshape(len(values), -1, 4) != 0).sum(-1)
            assert kept.max() == 2, name
            assert kept.min() == 2, name
        else:
            assert np.array_equal(values, before[name]), name


def test_pruning_methods_rank_as_in_their_papers(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """By the error of each matrix's outputs; the first block's, since later ones read what earlier ones made."""
    total = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        out = tmp_path / method
        receipt = compress(tiny_model("llama"), recipe(text, Prune(method=method)), out, device="cpu")
        errors = receipt.settings["errors"]
        assert len(errors) == 21
        total[method] = sum(
            error for name, error in errors.items() if name in ("layers.0.q", "layers.0.k", "layers.0.v")
        )
        zeros = [np.mean(values == 0) for name, values in numbers(out).items() if name in errors]
        assert np.mean(zeros) == pytest.approx(0.5, abs=0.01)
    assert total["sparsegpt"] < total["wanda"] < total["magnitude"]


def test_quantising_keeps_the_zeros(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    prune = Prune(pattern="2:4", targets=("mlp",))
    pruned = compress(tiny_model("llama"), recipe(text, prune), tmp_path / "pruned", device="cpu").settings["errors"]
    steps = (prune, Quantize("int8", 0, method="gptq"))
    receipt = compress(tiny_model("llama"), recipe(text, *steps), tmp_path / "out", device="cpu")
    for role in ("gate", "up", "down"):  # what rounding adds comes on top; later blocks read other inputs
        name, error = f"layers.0.{role}", pruned[f"layers.0.{role}"]
        assert 0 < error < receipt.settings["errors"][name] < 1.1 * error
    for name, values in numbers(tmp_path / "out").items():
        if name.endswith((".gate", ".up", ".down")):
            assert ((values.reshape(len(values), -1, 4) != 0).sum(-1) <= 2).all()


def test_a_later_recipe_keeps_2_of_4(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """Rounded again, by rounding alone or with text; what breaks the pattern gives it up."""
    pruned = made(tiny_model("llama"), recipe(text, Prune(pattern="2:4", targets=("mlp",))), tmp_path / "pruned")
    later = {
        "rtn": (Recipe((Quantize("int8", 0),)), True),
        "gptq": (recipe(text, Quantize("int8", 0, method="gptq")), True),
        "rotate": (recipe(text, Rotate(), Quantize("int8", 0)), False),
    }
    for name, (steps, kept) in later.items():
        compress(pruned, steps, tmp_path / name, device="cpu")
        found = {name: fmt for name, _, fmt in open_checkpoint(tmp_path / name).matrices()}
        assert found["layers.1.down"] == formats.Format("int8", sparse24=kept), name
        assert found["layers.1.q"] == formats.Format("int8"), name


def test_what_was_quantised_and_is_not_changed_stays_as_it_is(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    first = Recipe((Quantize("int8", 0), Quantize("bf16", targets=("layers.0.o", "head"))))
    model = made(tiny_model("llama"), first, tmp_path / "int8")
    formats_before, before = ({name: fmt.kind for name, _, fmt in open_checkpoint(model).matrices()}, numbers(model))
    for step, changed, note in (
        (QuantizeKv(), (), ""),
        (Quantize("int4", 0, method="gptq", targets=("mlp",)), (".gate", ".up", ".down"), "quantised again"),
        (Smooth(), (".q", ".k", ".v", ".gate", ".up", "norm"), r"15 matrices that were quantised (layers.0.q, ...)"),
    ):
        out = tmp_path / type(step).__name__
        receipt = compress(model, recipe(text, step), out, device="cpu")
        kinds = {name: fmt.kind for name, _, fmt in open_checkpoint(out).matrices()}
        for name, values in numbers(out).items():
            if not name.endswith(changed):
                assert kinds.get(name) == formats_before.get(name), name
                assert np.array_equal(values, before[name]), name
        assert any(note in found for found in receipt.notes) if note else not receipt.notes


def test_structures_and_layers_taken_out_of_pruned_and_split_models(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """2:4 matrices are cut as the numbers that they stand for; whole layers are taken whatever form they have."""
    from hasten.train.student import take_layers

    prune = Prune(pattern="2:4", targets=("layers.1.up", "layers.2.down"))
    pruned = made(tiny_model("llama"), recipe(text, prune), tmp_path / "pruned")
    before = numbers(pruned)
    shrunk = numbers(made(pruned, recipe(text, Shrink(layers=0.34)), tmp_path / "shrunk"))
    assert any(np.array_equal(before["layers.1.up"], shrunk.get(f"layers.{index}.up")) for index in range(2))
    made(pruned, recipe(text, Shrink(neurons=0.5)), tmp_path / "narrow")
    steps = (prune, Factorize(targets=("layers.*.q",), rank=8), Distill(keep_layers=(1, 2), sequence_len=64))
    plan = resolve(Recipe((steps[0], steps[2])), open_checkpoint(tiny_model("llama")).spec)
    assert plan.sparse == {"layers.0.up", "layers.1.down"}
    plan = resolve(Recipe(steps[1:]), open_checkpoint(tiny_model("llama")).spec)
    assert plan.factorized == {"layers.0.q": 8, "layers.1.q": 8}
    split = made(tiny_model("llama"), recipe(text, SplitExperts(4, 2), steps[1]), tmp_path / "split")
    take_layers(split, tmp_path / "taken", (1, 2))
    before, after = numbers(split), numbers(tmp_path / "taken")
    for role in ("router", "q.a", "q.b", "down", "attn_norm"):
        assert np.array_equal(before[f"layers.2.{role}"], after[f"layers.1.{role}"]), role
    assert len(open_checkpoint(tmp_path / "taken").spec.layers) == 2


def test_recovering_lowers_the_error_and_keeps_the_zeros(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    prune = Prune(sparsity=0.6, method="wanda")
    plain = numbers(made(tiny_model("llama_bias"), recipe(text, prune), tmp_path / "plain"))
    last = made(tiny_model("llama_bias"), recipe(text, prune, Recover(steps=30, learning_rate=6e-3)), tmp_path / "fit")
    fitted = numbers(last)
    for name, values in plain.items():
        if name in ("embed", "head", "final_norm"):
            assert np.array_equal(values, fitted[name])
        elif name.startswith("layers.0") and values.shape[1] > 1:
            assert np.array_equal(values == 0, fitted[name] == 0), name
            assert not np.array_equal(values, fitted[name]), name
    wanted = logits(tiny_model("llama_bias"))
    lost = {folder: np.square(logits(tmp_path / folder) - wanted).mean() for folder in ("plain", "fit")}
    assert lost["fit"] < 0.8 * lost["plain"]


def test_recovering_norms_alone_and_what_does_not_help(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    prune = Prune(sparsity=0.3, targets=("mlp",), method="wanda")
    recover = Recover(steps=5, learning_rate=1e-3, parts=("norms",))
    before = numbers(made(tiny_model("gpt2"), recipe(text, prune), tmp_path / "plain"))
    after = numbers(made(tiny_model("gpt2"), recipe(text, prune, recover), tmp_path / "norms"))
    changed = {name.split(".", 2)[-1] for name, values in after.items() if not np.array_equal(values, before[name])}
    assert changed >= {"attn_norm", "mlp_norm"}
    assert not any(name.endswith(".bias") for name in changed)
    receipt = compress(
        tiny_model("gpt2"), recipe(text, prune, Recover(steps=3, learning_rate=0.9)), tmp_path / "bad", device="cpu"
    )
    assert any("recover did not help on held-out sequences" in note for note in receipt.notes)


@pytest.mark.parametrize("family", ["llama_bias", "qwen3", "phi3", "gpt2", "gpt_neox"])
def test_low_rank_folders_keep_the_budget_and_reload(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    steps = (Factorize(keep=0.6, ignore=("layers.0.*",)), Quantize("int8", 0, targets=("mlp",)))
    receipt = compress(tiny_model(family), recipe(text, *steps), tmp_path / "out", device="cpu")
    checkpoint = open_checkpoint(tmp_path / "out")
    before = {
        n: s for n, s, _ in open_checkpoint(tiny_model(family)).matrices() if n.startswith(("layers.1", "layers.2"))
    }
    after = {n: (s, f) for n, s, f in checkpoint.matrices() if n.startswith(("layers.1", "layers.2"))}
    assert 0.5 < sum(n * k for (n, k), _ in after.values()) / sum(n * k for n, k in before.values()) <= 0.6
    assert not checkpoint.spec.layers[0].ranks
    assert sum(len(layer.ranks) for layer in checkpoint.spec.layers) == len(
        [name for name in after if name.endswith(".a")]
    )
    for name, (_, fmt) in after.items():
        assert fmt.kind == ("int8" if name.split(".")[2] in ("gate", "up", "down") else "fp32"), name
    assert all(error < 1 for error in receipt.settings["errors"].values())
    want = logits(tmp_path / "out")
    with torch.no_grad():
        ids = torch.tensor([unseen(tmp_path / "out")])
        found = load_torch(tmp_path / "out", dtype=torch.float32)(ids).logits[0].numpy()
    np.testing.assert_allclose(found, want, atol=1e-3 * np.abs(want).max())


def test_whitening_beats_plain_svd(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    wanted, lost = logits(tiny_model("llama")), {}
    for method in ("svd", "svd-llm"):
        out = made(tiny_model("llama"), recipe(text, Factorize(rank=24, method=method)), tmp_path / method)
        assert all(rank == 24 for layer in open_checkpoint(out).spec.layers for _, rank in layer.ranks)
        lost[method] = np.square(logits(out) - wanted).mean()
    assert lost["svd-llm"] < lost["svd"]


def test_what_would_not_shrink_stays_whole(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    """k and v are 24 x 72: 18 ranks hold as many numbers as they do."""
    receipt = compress(tiny_model("llama"), recipe(text, Factorize(rank=20)), tmp_path / "out", device="cpu")
    roles = {role for layer in open_checkpoint(tmp_path / "out").spec.layers for role, _ in layer.ranks}
    assert roles == {"q", "o", "gate", "up", "down"}
    assert dict(model_facts(open_checkpoint(tmp_path / "out")))["low rank"] == "15 matrices in two, of rank 20"
    assert receipt.notes == tuple(
        f"layers.*.{role} (3): stays as it is, two would hold no fewer numbers" for role in "kv"
    )


@pytest.mark.parametrize("family", ["llama_bias", "gpt2"])
def test_all_experts_are_the_model_and_fewer_reload(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    model, every = tiny_model(family), SplitExperts(experts=4, active=4)
    found, want = logits(made(model, recipe(text, every), tmp_path / "all")), logits(model)
    np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
    out = made(model, recipe(text, SplitExperts(4, 2), Quantize("int8", 0)), tmp_path / "some")
    checkpoint = open_checkpoint(out)
    assert {(layer.experts, layer.active_experts) for layer in checkpoint.spec.layers} == {(4, 2)}
    assert dict(model_facts(checkpoint))["experts"] == "2 of 4 run, in 3 layers"
    want = logits(out)
    with torch.no_grad():
        found = load_torch(out, dtype=torch.float32)(torch.tensor([unseen(out)])).logits[0].numpy()
    np.testing.assert_allclose(found, want, atol=2e-3 * np.abs(want).max())


def test_spectral_experts_lose_less_than_random_ones(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    lost = {}
    for method in ("spectral", "random"):
        step = SplitExperts(4, 1, method=method)
        receipt = compress(planted(tiny_model("llama"), tmp_path), recipe(text, step), tmp_path / method, device="cpu")
        lost[method] = receipt.settings["errors"]["layers.0.experts"]
    assert lost["spectral"] < 0.7 * lost["random"]


def planted(model: Path, tmp_path: Path) -> Path:
    """The model with neurons that fire together four by four: gates of a group look the same way."""
    out = tmp_path / "planted"
    if not out.exists():
        changed = load_torch(model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in changed.model.layers:
                ways = torch.randn(4, 72, generator=generator) * 1.2
                group = torch.randperm(172, generator=generator) % 4
                layer.mlp.gate_proj.weight.copy_(ways[group] + 0.05 * torch.randn(172, 72, generator=generator) - 0.1)
        changed.save_pretrained(out)
        (out / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
    return out


def test_an_interrupted_recipe_of_forms_goes_on(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    steps = (Factorize(keep=0.7, targets=("attention",)), SplitExperts(4, 2))
    steps = (*steps, Recover(steps=3, learning_rate=0.5), Quantize("int8", 0))
    wanted, model = recipe(text, *steps), tiny_model("qwen3")

    def stop(done: int, total: int, what: str) -> None:
        if what.startswith("block 3"):
            raise KeyboardInterrupt

    whole = compress(model, wanted, tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        compress(model, wanted, tmp_path / "out", device="cpu", progress=stop)
    assert len(list((tmp_path / "out.work").rglob("block-*.npz"))) == 2
    resumed = compress(model, wanted, tmp_path / "out", device="cpu")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert resumed.settings["errors"] == whole.settings["errors"]
    assert resumed.notes == whole.notes
    assert "layers.0: recover did not help" in whole.notes[0]


@pytest.mark.parametrize(
    ("changes", "step", "message"),
    [
        ({"intermediate_size": 174}, Prune(pattern="2:4"), r"layers.0.down has 174 inputs, 2:4 needs a multiple of 4"),
        ({}, Factorize(rank=25), r"rank is 25, layers.0.k is a matrix of \(24, 72\): at most 24"),
        (
            {},
            SplitExperts(experts=3, active=1),
            r"experts is 3, layer 0 has 172 neurons: take a number that divides it",
        ),
        ({}, Factorize(targets=("embedding",)), r"factorize works on matrices of decoder layers, found embed"),
        ({}, Recover(), r"put it right behind prune, factorize or split_experts"),
        ({}, Prune(targets=("Linear", "head")), r"prune works on matrices of decoder layers, found head: ignore it"),
    ],
)
def test_what_does_not_fit_is_said_before_any_weight_is_read(
    changes: dict[str, int], step: Step, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compress(tiny_model("llama", **changes), Recipe((step,)), tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((Factorize(), SplitExperts(4, 2)), "layer 0's mlp is factorised, which is not split"),
        ((SplitExperts(4, 2), Factorize()), "layers.0.gate belongs to experts, which are not factorised"),
        ((Factorize(), Factorize(method="svd")), "layers.0.q is factorised already"),
        ((SplitExperts(4, 2), SplitExperts(4, 2)), "layer 0 is split into 4 experts already"),
        ((Factorize(), Prune()), "factorize and prune do not go together, each would undo the other: remove one"),
        ((Prune(), Factorize()), "prune and factorize do not go together, each would undo the other: remove one"),
        ((Factorize(), Smooth()), "smooth comes after factorize, and would undo it: put smooth in front of factorize"),
        ((Prune(pattern="2:4"), SplitExperts(4, 2)), "split_experts comes after prune, and would undo it"),
        ((SplitExperts(4, 2), Shrink(neurons=0.5)), "shrink comes after split_experts"),
        ((Factorize(), Quantize("int4", method="awq")), "awq and threshold are for matrices that are not factorised"),
    ],
)
def test_steps_that_do_not_go_together(
    steps: tuple[Step, ...], message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        compress(tiny_model("llama"), Recipe(steps), tmp_path / "out", device="cpu")
