"""Steps that train, in recipes: what comes out, what stays, what is said, and that a killed one goes on."""

import gc
import json
import resource
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hasten  # noqa: E402
from hasten.compress import calibration  # noqa: E402
from hasten.errors import HastenError, RecipeError, ResourceError  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.model.formats import dequantize  # noqa: E402
from hasten.receipt import used_texts  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Distill, Factorize, Finetune, Gradual, Prune, Quantize, Recover, Shrink, Smooth, Step, Training  # noqa: E402
from hasten.train import distill, finetune, lora, trainer  # noqa: E402
from hasten.train.data import Sequences, tokens_of  # noqa: E402
from hasten.train.distill import go_on  # noqa: E402
from hasten.train.masks import Masks  # noqa: E402

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.\n"
Model = Callable[..., Path]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


def run(model: Path, out: Path, text: str | None, *steps: Step, progress: Any = None) -> Any:
    """The receipt."""
    recipe = Recipe(steps, calibration=Calibration(text, num_sequences=8, sequence_len=24))
    return hasten.compress(model, recipe, out, device="cpu", progress=progress)


def short(text: str, **changes: Any) -> dict[str, Any]:
    return {"text": text, "steps": 6, "batch_size": 2, "sequence_len": 24, "learning_rate": 1e-3, **changes}


def numbers(folder: Path) -> dict[str, np.ndarray]:
    return {name: dequantize(weight) for name, weight in open_checkpoint(folder).weights()}


def test_sequences_are_a_function_of_seed_and_number() -> None:
    stream = torch.arange(100)
    some = Sequences(stream, 8, 40, seed=3, first=99)
    again = Sequences(stream, 8, 40, seed=3, first=99)
    last = again[39]["input_ids"]
    assert torch.equal(some.__getitems__(list(range(40)))["input_ids"][39], last)
    assert last[0] == 99
    assert (last[2:] - last[1:-1] == 1).all()
    one_epoch = some.__getitems__(list(range(some.per_epoch)))["input_ids"][:, 1:].flatten()
    assert len(one_epoch.unique()) == len(one_epoch)  # nothing twice
    with pytest.raises(RecipeError, match="training text has 5 tokens, a sequence has 8: give more text"):
        Sequences(torch.arange(5), 8, 1)


def test_finetuning_learns_its_text_and_logs(tiny_model: Model, text: str, tmp_path: Path) -> None:
    step = Finetune(**short(text, steps=16, learning_rate=8e-3, logs=str(tmp_path / "logs"), gradient_accumulation=2))
    receipt = run(tiny_model("llama"), tmp_path / "out", text, step)
    losses = [loss for _, loss in receipt.settings["finetune-0"]["loss"]]
    assert losses[-1] < losses[0] - 1.5
    assert list((tmp_path / "logs").glob("events*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out"]


def test_training_text_that_is_not_read_whole_is_noted(
    tiny_model: Model, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_MOST", 1 << 11)
    monkeypatch.setattr(calibration, "_PARTS", 4)
    receipt = run(tiny_model("llama"), tmp_path / "out", None, Finetune(**short(text, steps=1)))
    assert any("2,048 of them were read, evenly over it" in note for note in receipt.notes)


def test_equal_steps_have_a_curve_each(tiny_model: Model, text: str, tmp_path: Path) -> None:
    receipt = run(tiny_model("llama"), tmp_path / "out", text, *(Finetune(**short(text, steps=2)) for _ in range(2)))
    (_, first), (_, second) = (receipt.settings[name]["loss"][0] for name in ("finetune-0", "finetune-1"))
    assert second < first


def test_fresh_starts_at_the_loss_of_guessing(tiny_model: Model, text: str, tmp_path: Path) -> None:
    receipt = run(tiny_model("qwen3"), tmp_path / "out", text, Finetune(fresh=True, **short(text, steps=2)))
    (_, first), *_ = receipt.settings["finetune-0"]["loss"]
    assert first == pytest.approx(np.log(307), abs=0.1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3"])
def test_training_nothing_changes_nothing(family: str, tiny_model: Model, text: str, tmp_path: Path) -> None:
    """Through load_torch, Trainer and back: every weight finds its place."""
    model = tiny_model(family)
    run(model, tmp_path / "out", text, Finetune(**short(text, steps=1, learning_rate=1e-30)))
    before, after = numbers(model), numbers(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-6, atol=1e-7, err_msg=name)


def test_what_a_teacher_has_seen_counts_as_used(tiny_model: Model, text: str, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("Of arms and the man, long ago and far away, sing softly to us now. " * 60)
    model, other = tiny_model("llama"), str(tmp_path / "other.txt")
    run(model, tmp_path / "teacher", other, Finetune(**short(other, steps=1)))
    run(model, tmp_path / "out", text, Distill(teacher=str(tmp_path / "teacher"), **short(text, steps=1)))
    assert [used.named for used in used_texts(tmp_path / "out")] == [(other,), (text,)]


def test_a_killed_training_goes_on_to_the_same_end(tiny_model: Model, text: str, tmp_path: Path) -> None:
    step = Distill(
        keep_layers=(0, 2), samples="student", dropout=0.1, hidden=1.0, sparsity=Gradual(0.5, 1, 9, every=2),
        **short(text, steps=10),
    )  # fmt: skip
    whole = run(tiny_model("llama"), tmp_path / "whole", text, step)

    class Killed(Exception):  # noqa: N818
        pass

    told: list[str] = []

    def kill(done: int, total: int, what: str) -> None:
        told.append(what)
        if "step 7" in what:
            raise Killed

    with pytest.raises(Killed):
        run(tiny_model("llama"), tmp_path / "out", text, step, progress=kill)
    assert not (tmp_path / "out").exists()
    told.clear()
    resumed = run(
        tiny_model("llama"), tmp_path / "out", text, step, progress=lambda done, total, what: told.append(what)
    )
    assert told[0].startswith("distill: step 7")
    assert resumed.settings["distill-0"]["loss"] == whole.settings["distill-0"]["loss"]
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def small_model() -> Any:
    torch.manual_seed(1)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def fit_small(work: Path, steps: int = 7, **around: Any) -> tuple[trainer.Trained, dict[str, torch.Tensor]]:
    training = Training(steps=steps, batch_size=2, sequence_len=16, logs=around.pop("logs", None))
    model = small_model()
    sequences = Sequences(torch.arange(200) % 64, 16, 2 * steps)
    return trainer.fit(model, sequences, training, trainer.Around(work, **around)), model.state_dict()


def test_a_training_that_was_done_is_not_done_again(tmp_path: Path) -> None:
    first, weights = fit_small(tmp_path)
    again, same = fit_small(tmp_path)
    assert (again.curve, again.tokens, again.seconds) == (first.curve, 0, 0)
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    (tmp_path / "checkpoint-7/trainer_state.json").write_text('{"cut')  # killed while it was written
    third, same = fit_small(tmp_path)
    assert third.curve == first.curve
    assert third.tokens > 0


def test_layers_run_again_for_want_of_memory_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    tokens, numbers = 8 * 512, sum(parameter.numel() for parameter in model.parameters())
    needed = 12 * numbers + tokens * (64 * 16 + 16 * 64)
    assert trainer.is_tight(model, Training(), needed / 0.81)
    assert not trainer.is_tight(model, Training(), needed / 0.79)
    _, weights = fit_small(tmp_path / "one")
    monkeypatch.setattr(trainer, "free_memory", lambda device: 0.0)
    _, same = fit_small(tmp_path / "two")
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_the_last_loss_is_told_and_a_lost_one_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_LOGS", 2)
    told: list[str] = []
    found, _ = fit_small(tmp_path / "one", tell=lambda part, what: told.append(what))
    assert [step for step, _ in found.curve] == [3, 6, 7]
    assert told[0] == "step 1"
    assert told[6].startswith("step 7, loss 4.")

    def lost(model: Any, tokens: torch.Tensor, step: int) -> torch.Tensor:
        return trainer.text_loss(model, tokens, step) * (float("nan") if step >= 2 else 1.0)

    found, _ = fit_small(tmp_path / "two", steps=40, loss=lost)
    assert found.curve[-1][0] == 20
    assert np.isnan(found.curve[-1][1])


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of a GPU on the CPU: bfloat16 autocast over float32, what is frozen in its own dtype."""
    own = trainer._arguments

    def arguments(*given: Any) -> Any:
        found = own(*given)
        found.bf16, found.mixed_precision = True, "bf16"
        return found

    monkeypatch.setattr(trainer, "_arguments", arguments)
    for module in (distill, lora):
        monkeypatch.setattr(module, "frozen_dtype", lambda folder, device: torch.bfloat16)


def test_mixed_precision_of_all_that_trains(mixed: None, tiny_model: Model, text: str, tmp_path: Path) -> None:
    model = tiny_model("llama", dtype="bfloat16")
    steps = (
        Shrink(hidden=0.25),
        Distill(hidden=1.0, attention=1.0, samples="student", loss="jensen-shannon", **short(text)),
        Prune(method="magnitude"),
        Recover("lora", rank=2, **short(text)),
    )
    receipt = run(model, tmp_path / "out", text, *steps)
    assert np.isfinite([loss for _, loss in receipt.settings["distill-1"]["loss"]]).all()
    pruned = numbers(tmp_path / "out")["layers.1.up"]
    assert (pruned == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_nothing_holds_a_model_that_was_trained(mixed: None, tmp_path: Path) -> None:
    model = small_model()
    weights = {"layers.0.up": model.model.layers[0].mlp.up_proj.weight}
    held = weakref.ref(model), weakref.ref(weights["layers.0.up"])
    masks = Masks(weights, Gradual(0.5, 0, 1))
    sequences, training = Sequences(torch.arange(200) % 64, 16, 2), Training(steps=1, batch_size=2)
    trainer.fit(model, sequences, training, trainer.Around(tmp_path, after=masks))
    gc.disable()
    try:
        del model, weights, masks
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"logs is .*file, which cannot be written"):
        fit_small(tmp_path / "work", logs=str(tmp_path / "file"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(ResourceError, match=r"checkpoints cannot be written to .*: is the disk full"):
            fit_small(tmp_path / "work")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_gradual_pruning_ends_exactly_and_is_stripped(tiny_model: Model, text: str, tmp_path: Path) -> None:
    gradual = Gradual(0.5, 1, 4, every=1, pattern="2:4", targets=("mlp",))
    steps = (Smooth(), Finetune(**short(text, sparsity=gradual)), Quantize("int8", 0, targets=("attention",)))
    run(tiny_model("llama"), tmp_path / "out", text, *steps)
    stored = {name: fmt.sparse24 for name, _, fmt in open_checkpoint(tmp_path / "out").matrices()}
    assert [name for name, sparse in stored.items() if sparse] == [
        f"layers.{index}.{role}" for index in range(3) for role in ("gate", "up", "down")
    ]
    for name, values in numbers(tmp_path / "out").items():
        if name.endswith(("gate", "up", "down")):
            assert ((values.reshape(-1, 4) != 0).sum(1) == 2).all(), name
        elif name.endswith((".q", ".o")):
            assert (values != 0).mean() > 0.9, name  # int8 rounds some to zero


@pytest.mark.parametrize("how", ["finetune", "lora"])
def test_pruned_weights_stay_pruned_and_others_move(how: str, tiny_model: Model, text: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    prune = Prune(method="magnitude")
    after: Step = Finetune(**short(text))
    if how == "lora":
        after = Recover("lora", rank=4, **short(text))
    run(model, tmp_path / "pruned", text, prune)
    run(model, tmp_path / "out", text, prune, after)
    pruned, trained = numbers(tmp_path / "pruned"), numbers(tmp_path / "out")
    for name in pruned:
        if name.startswith("layers.") and pruned[name].shape[1] > 1:
            np.testing.assert_array_equal(trained[name] == 0, pruned[name] == 0, err_msg=name)
            assert not np.array_equal(trained[name], pruned[name]), name


def test_lora_adds_its_rank_and_no_more(tiny_model: Model, text: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    run(model, tmp_path / "out", text, Recover("lora", rank=3, **short(text)))
    before, after = numbers(model), numbers(tmp_path / "out")
    difference = np.linalg.svd(after["layers.1.up"] - before["layers.1.up"], compute_uv=False)
    assert difference[2] > 100 * difference[3]
    np.testing.assert_array_equal(after["embed"], before["embed"])


def test_lora_keeps_what_trains_alone_and_goes_on_to_the_same_end(tiny_model: Model, text: str, tmp_path: Path) -> None:
    step = Recover("lora", rank=3, **short(text))
    run(tiny_model("llama"), tmp_path / "whole", text, step)

    def kill(done: int, total: int, what: str) -> None:
        if "step 4" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny_model("llama"), tmp_path / "out", text, step, progress=kill)
    kept = torch.load(tmp_path / "out.work/work-0/checkpoint-3/pytorch_model.bin", weights_only=True)
    assert all(name.endswith((".0.a", ".0.b")) for name in kept)
    run(tiny_model("llama"), tmp_path / "out", text, step)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_factors_thinner_than_the_rank_take_what_fits(tiny_model: Model, text: str, tmp_path: Path) -> None:
    steps = (Factorize(rank=2, targets=("mlp",), method="svd"), Recover("lora", rank=4, **short(text, steps=2)))
    run(tiny_model("llama"), tmp_path / "out", text, *steps)
    assert open_checkpoint(tmp_path / "out").spec.layers[0].rank_of("down") == 2


def test_memory_that_runs_out_is_said_in_a_line(
    tiny_model: Model, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(finetune, "fit", too_much)
    with pytest.raises(ResourceError, match=r"the GPU's memory ran out in finetune: .*lower batch_size"):
        run(tiny_model("llama"), tmp_path / "out", text, Finetune(**short(text)))
    assert not (tmp_path / "out.work").exists()


def test_shrink_distill_factorize_quantize(tiny_model: Model, text: str, tmp_path: Path) -> None:
    steps = (
        Shrink(heads=0.5, neurons=0.5),
        Distill(hidden=1.0, attention=1.0, loss="jensen-shannon", beta=0.3, temperature=2.0, **short(text)),
        Factorize(rank=8, targets=("mlp",)),
        Recover("lora", rank=2, **short(text)),
        Quantize("int8", 0),
    )
    receipt = run(tiny_model("llama"), tmp_path / "out", text, *steps)
    assert {"distill-1", "recover-3"} <= receipt.settings.keys()
    spec = open_checkpoint(tmp_path / "out").spec
    assert spec.layers[0].num_heads == 3
    assert spec.layers[0].rank_of("down") == 8
    tokens = torch.arange(5, 25)[None]
    assert torch.isfinite(hasten.load_torch(tmp_path / "out")(input_ids=tokens).logits).all()


def test_a_teacher_writes_what_a_student_of_its_own_shape_learns(
    tiny_model: Model, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    step = Distill(student=str(tmp_path / "config.json"), samples="teacher", loss="reverse-kl", **short(text))
    monkeypatch.setattr(calibration, "_WRITTEN_AT_ONCE", 5)
    told: list[str] = []
    run(model, tmp_path / "out", text, step, progress=lambda done, total, what: told.append(what))
    assert told[:3] == [f"distill: the teacher writes, {done} of 12 sequences" for done in (0, 5, 10)]
    assert len(open_checkpoint(tmp_path / "out").spec.layers) == 1
    run(model, tmp_path / "without", None, replace(step, text=None, steps=2))


def test_layers_are_matched_as_the_recipe_says(
    tiny_model: Model, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a student that is its teacher's layer 1, the first layer's attention learns from what the recipe names."""
    matched: list[Any] = []
    plain = distill.attention_loss, distill.hidden_loss
    monkeypatch.setattr(distill, "attention_loss", lambda *a: matched.append(a[2]) or plain[0](*a))
    monkeypatch.setattr(distill, "hidden_loss", lambda *a: matched.append(a[2]) or plain[1](*a))
    losses = []
    for pairs in ((), ((1, 0),)):
        step = Distill(
            keep_layers=(0, 1), weight=0.0, hidden=1.0, attention=1.0, layer_map=pairs, **short(text, steps=1)
        )
        out = tmp_path / str(len(pairs))
        losses.append(run(tiny_model("llama"), out, text, step).settings["distill-0"]["loss"][0][1])
        assert Recipe.load(out).steps == (step,)
    assert matched == [((0, 0), (1, 2))] * 2 + [((1, 0),)] * 2
    assert losses[0] != losses[1]


def test_the_time_of_a_teacher_that_writes_is_told(
    tiny_model: Model, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_WRITTEN_AT_ONCE", 4)
    for source in (text, None):
        told: list[tuple[int, int, str]] = []
        step = Distill(samples="teacher", **{**short(text), "text": source})
        run(tiny_model("llama"), tmp_path / str(source is None), source, step, progress=partial(_keep, told))
        parts = [done for done, _, _ in told]
        assert parts == sorted(parts)
        assert parts[:3] == [0, 0, 1]  # of 3, with none, a third and two thirds of the first half done
        assert parts[-1] == 3


def _keep(told: list[tuple[int, int, str]], *call: Any) -> None:
    told.append(call)


def test_a_student_writes_tokens_that_both_know() -> None:
    tokens = torch.arange(6).view(2, 3)
    written = go_on(small_model(), tokens, 60, vocab=9)
    assert written.shape == (2, 63)
    assert torch.equal(written[:, :3], tokens)
    assert len(written[:, 3:].unique()) == 9


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny_model: Model, text: str, tmp_path: Path) -> None:
    for loss in ("forward-kl", "reverse-kl", "jensen-shannon"):
        step = Distill(loss=loss, weight=1.0, hidden=1.0, attention=1.0, **short(text, steps=1, learning_rate=1e-12))
        receipt = run(tiny_model("llama"), tmp_path / loss, text, step)
        assert abs(receipt.settings["distill-0"]["loss"][0][1]) < 1e-4


def test_distilled_is_better_than_alone(shared_data: Path, tmp_path: Path) -> None:
    """Every other layer of a small model, trained on little text for the same steps, with its teacher and without."""
    model = shared_data / "stories260K"
    stories = (shared_data / "tinystories-slice" / "tinystories_slice.txt").read_text()
    (tmp_path / "text.txt").write_text(stories[:60_000])
    (tmp_path / "unseen.txt").write_text(stories[-30_000:])
    unseen = tokens_of(str(tmp_path / "unseen.txt"), model)[0][: 64 * 128].view(64, 128).long()
    found = {}
    for name, weight in (("alone", 0.0), ("distilled", 0.5)):
        step = Distill(
            keep_layers=(0, 2, 4), weight=weight, steps=50, batch_size=4, sequence_len=64, learning_rate=4e-3,
            text=str(tmp_path / "text.txt"),
        )  # fmt: skip
        run(model, tmp_path / name, None, step)
        student = hasten.load_torch(tmp_path / name, torch.float32)
        with torch.no_grad():
            found[name] = student(input_ids=unseen, labels=unseen).loss.item()
    assert found["distilled"] < found["alone"] - 0.01


def test_errors_say_what_to_do(tiny_model: Model, text: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    other = tmp_path / "other"
    other.mkdir()
    for file in model.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    one, two = list(vocab)[40:42]
    vocab[one], vocab[two] = vocab[two], vocab[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(RecipeError, match=r"the vocabulary of the teacher .* they must be the same, take a teacher"):
        run(model, tmp_path / "out", text, Shrink(layers=0.34), Distill(teacher=str(other), **short(text)))
    with pytest.raises(RecipeError, match="keep_layers names layer 7, the model has 3"):
        run(model, tmp_path / "out", text, Distill(keep_layers=(0, 7)))
    with pytest.raises(RecipeError, match="and there is no such file"):
        run(model, tmp_path / "out", text, Distill(student=str(tmp_path / "none.json")))
    for targets, message in (("layers.9.q", "matches no matrix"), ("head", "sparsity works on matrices of decoder")):
        with pytest.raises(RecipeError, match=message):
            run(model, tmp_path / "out", text, Finetune(sparsity=Gradual(0.5, 0, 9, targets=(targets,))))
    assert not (tmp_path / "out.work").exists()
    with pytest.raises(RecipeError, match=r"rank is 60, layers\.0\.k is a matrix"):
        run(model, tmp_path / "out", text, Recover("lora", rank=60, **short(text)))
    with pytest.raises(HastenError, match="training sequences have 512 tokens, the model at most 256"):
        run(model, tmp_path / "out", text, Finetune(**short(text, sequence_len=512)))
    short_teacher = tiny_model("gpt2", max_position_embeddings=16)
    with pytest.raises(HastenError, match="training sequences have 24 tokens, the teacher at most 16"):
        run(tiny_model("gpt2"), tmp_path / "out", text, Distill(teacher=str(short_teacher), **short(text)))
    assert not (tmp_path / "out.work").exists()  # a mended recipe takes the same name


def test_what_a_later_step_needs_is_known_before_the_first(tiny_model: Model, text: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "little.txt").write_text("Too little.")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    for name, message in (
        ("nope.txt", "no calibration text at .*nope.txt"),
        ("empty.txt", "empty.txt is empty: give text"),
        ("little.txt", r"little.txt has \d tokens, a sequence has 24: give more text, or lower sequence_len"),
        ("binary.txt", "cannot read calibration text .*binary.txt"),
    ):
        told: list[tuple[int, int, str]] = []
        steps = (Shrink(neurons=0.5), Distill(**short(str(tmp_path / name))))
        with pytest.raises(HastenError, match=message):
            run(tiny_model("llama"), tmp_path / "out", text, *steps, progress=partial(_keep, told))
        assert not told
        assert not (tmp_path / "out.work").exists()
    logs = str(tmp_path / "empty.txt" / "logs")
    with pytest.raises(ResourceError, match=r"logs is .*, which cannot be made: .*empty.txt is no folder"):
        run(tiny_model("llama"), tmp_path / "out", text, Shrink(neurons=0.5), Finetune(**short(text, logs=logs)))
    assert not (tmp_path / "out.work").exists()


def test_a_loss_is_compared_with_one_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that a student writes itself lose half: the last is one, the first is not."""
    monkeypatch.setattr(trainer, "_LOGS", 20)

    def loss(model: Any, tokens: torch.Tensor, step: int) -> torch.Tensor:
        return trainer.text_loss(model, tokens, step) * 0 + (2.0 if step % 2 == 0 else 1.0)

    found, _ = fit_small(tmp_path, steps=20, loss=loss, kind=lambda number: "given" if number % 2 == 0 else "written")
    assert (found.curve[0][1], found.curve[-1][1]) == (2, 1)
    assert found.ends() == (1.5, 1.5)
    assert not found.rose
    again, _ = fit_small(tmp_path, steps=20, loss=loss, kind=lambda number: "given")
    assert again.ends() == (1.5, 1.5)  # of a training that was done, as it was noted then


def test_a_student_that_writes_has_ends_of_both_kinds(tiny_model: Model, text: str, tmp_path: Path) -> None:
    step = Distill(samples="student", **short(text))
    lesson = distill.Lesson(step, None, torch.nn.Identity(), 1)
    kinds = [lesson.kind(number) for number in range(step.steps)]
    assert set(kinds) == {"given", "written"}
    settings = run(tiny_model("llama"), tmp_path / "out", text, step).settings["distill-0"]
    losses = {kind: [loss for (_, loss), k in zip(settings["loss"], kinds, strict=True) if k == kind] for kind in kinds}
    for end, index in zip(settings["ends"], (0, -1), strict=True):
        assert end == pytest.approx(np.mean([found[index] for found in losses.values()]), abs=1e-3)


def test_a_loss_that_rose_is_noted(tiny_model: Model, text: str, tmp_path: Path) -> None:
    step = Finetune(**short(text, steps=12, learning_rate=0.5, warmup=0.0, schedule="constant"))
    receipt = run(tiny_model("llama"), tmp_path / "out", text, step)
    (note,) = [line for line in receipt.notes if "rose" in line]
    first, last = receipt.settings["finetune-0"]["ends"]
    assert note == f"finetune: the loss rose from {first:.3f} to {last:.3f}: lower learning_rate, which is 0.5"
    fine = run(tiny_model("llama"), tmp_path / "fine", text, Finetune(**short(text)))
    assert not any("rose" in line for line in fine.notes)
