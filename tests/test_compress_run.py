"""Recipes that look at text: stages, interruptions, what the receipt says, and errors before any weight is read."""

import importlib
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hasten.backends.torch.load import load_torch  # noqa: E402
from hasten.compress.calibration import read  # noqa: E402
from hasten.compress.folder import compress  # noqa: E402
from hasten.errors import HastenError, RecipeError, ResourceError  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402
from hasten.receipt import Receipt  # noqa: E402
from hasten.recipe import Calibration, Recipe  # noqa: E402
from hasten.steps import Factorize, Prune, Quantize, QuantizeKv, Recover, Rotate, Smooth, SplitExperts  # noqa: E402

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune must want a wife.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT * 40)
    return str(file)


def smooth(text: str | None) -> Recipe:
    steps = (Smooth(), Quantize("int8", 0, activations="int8"), Quantize("int8", 0, targets=("head",)))
    return Recipe(steps, calibration=Calibration(text, num_sequences=8, sequence_len=24))


def test_the_folder_its_papers_and_nothing_else(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    model = tiny_model("llama")
    receipt = compress(
        model, smooth(text), tmp_path / "out", device="cpu", progress=lambda *values: told.append(values)
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert Receipt.load(tmp_path / "out") == receipt
    assert Recipe.load(tmp_path / "out") == smooth(text)
    assert len(receipt.settings["calibration"]["sha256"]) == 64
    assert receipt.settings["peak_memory"]["host"] > 0
    assert told[-1][0] == told[-1][1]
    formats = {name: fmt.kind for name, _, fmt in open_checkpoint(tmp_path / "out").matrices()}
    assert {name for name, kind in formats.items() if kind != "int8"} == {"embed"}


def test_killed_and_run_again_gives_the_same_folder(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    recipe, model = smooth(text), tiny_model("llama")
    whole = compress(model, recipe, tmp_path / "whole", device="cpu")
    code = (
        "import os, signal, sys; from hasten.compress.folder import compress\n"
        "def tell(done, total, what):\n"
        "    if done == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "compress(sys.argv[1], sys.argv[2], sys.argv[3], device='cpu', progress=tell)\n"
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-c", code, str(model), str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    blocks = sorted((tmp_path / "out.work").rglob("block-*.npz"))
    assert len(blocks) == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(ResourceError, match="unfinished work of another recipe or model"):
        compress(model, Recipe((Smooth(0.7), *recipe.steps[1:]), calibration=recipe.calibration), tmp_path / "out")
    written = [os.stat(block).st_mtime_ns for block in blocks]
    told: list[str] = []

    def look(done: int, total: int, what: str) -> None:
        told.append(what)
        if done == 2:
            assert [os.stat(block).st_mtime_ns for block in blocks] == written

    resumed = compress(model, recipe, tmp_path / "out", device="cpu", progress=look)
    assert len(told) == 4
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert resumed.settings["errors"] == whole.settings["errors"]


def test_text_that_is_too_short_or_missing(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(RecipeError, match=r"gives 0 sequences of 24 tokens, 8 are asked for: give more text"):
        compress(tiny_model("llama"), smooth(str(tmp_path / "short.txt")), tmp_path / "out", device="cpu")
    with pytest.raises(HastenError, match=r"no calibration text at .*missing.txt"):
        compress(tiny_model("llama"), smooth(str(tmp_path / "missing.txt")), tmp_path / "out2", device="cpu")
    with pytest.raises(HastenError, match=r"no calibration text at nofile: there is no such file or folder"):
        list(read("nofile"))  # at once: the hub is asked about OWNER/NAME alone


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("olmo2", Smooth(), "folds into the norm before a matrix, and olmo2 has none"),
        ("gemma3", Rotate(), "rotate needs RMS norms before attention and MLP and nowhere else"),
        (
            "phi3",
            Quantize("int8", 0, targets=("layers.*.q",)),
            "are one matrix in Transformers .* fp32, int8: target all",
        ),
        ("gpt2", Quantize("int8", 0, method="gptq", targets=("layers.*.k",)), "are one matrix in Transformers"),
        ("llama", Prune(targets=("layers.9.q",)), "target 'layers.9.q' matches no matrix"),
        ("llama", Prune(targets=("mlp",), ignore=("mlp",)), "prune targets mlp and ignores mlp: nothing is left"),
    ],
)
def test_a_recipe_is_checked_before_any_weight(
    family: str, step: object, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model(family)
    with pytest.raises(RecipeError, match=message):
        compress(model, Recipe((step,)), tmp_path / "out", device="cpu")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_steps_that_undo_others_are_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for steps, message in (
        ((Quantize("int8"), Prune()), "prune comes after quantize"),
        ((Prune(), Rotate()), "rotate comes after prune, and would undo it"),
        ((Smooth(), Rotate()), "rotate comes after smooth, and would undo it"),
        ((QuantizeKv(), Prune()), "prune comes after quantize_kv"),
    ):
        with pytest.raises(RecipeError, match=message):
            compress(tiny_model("llama"), Recipe(steps), tmp_path / "out", device="cpu")


def test_widths_that_do_not_fit_and_packages_that_are_missing(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow = tiny_model("llama", intermediate_size=170)
    with pytest.raises(RecipeError, match=r"layers.0.down has 170 inputs, 2:4 needs a multiple of 4"):
        compress(narrow, Recipe((Prune(pattern="2:4"),)), tmp_path / "out", device="cpu")
    with pytest.raises(RecipeError, match=r"layers.0.q has 72 inputs, not a multiple of group_size 32"):
        compress(narrow, Recipe((Quantize("int4", 32, method="gptq"),)), tmp_path / "out", device="cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match=r"needs torch and transformers, not installed here: pip install"):
        compress(narrow, smooth(text), tmp_path / "out", device="cpu")
    with pytest.raises(ResourceError, match="data sets need the package datasets: pip install datasets"):
        list(read("some/name"))


def test_text_from_a_folder_a_data_set_and_the_model_itself(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    from hasten.compress.calibration import calibration_tokens

    model = tiny_model("llama")
    settings = Calibration(text, num_sequences=4, sequence_len=16)
    from_file = calibration_tokens(settings, model)
    assert from_file.shape == (4, 16)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/one.txt").write_text(TEXT * 40)
    (tmp_path / "folder/skip.bin").write_bytes(b"\xff\xfe")
    assert np.array_equal(calibration_tokens(Calibration(str(tmp_path / "folder"), 4, 16), model), from_file)
    own = calibration_tokens(Calibration(None, 4, 16, seed=3), model)
    assert own.shape == (4, 16)
    assert (own[:, 0] == 1).all()
    assert np.array_equal(calibration_tokens(Calibration(None, 4, 16, seed=3), model), own)
    assert not np.array_equal(calibration_tokens(Calibration(None, 4, 16, seed=4), model), own)


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_scales_of_the_cache_are_the_largest_keys_and_values(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    """Transformers calls its layers with the cache by its place in GPT-2, and by name elsewhere."""
    from safetensors.torch import load_file

    from hasten.compress.calibration import calibration_tokens

    settings = Calibration(text, num_sequences=4, sequence_len=16)
    compress(tiny_model(family), Recipe((QuantizeKv(),), calibration=settings), tmp_path / "out", device="cpu")
    model = load_torch(tiny_model(family))
    with torch.no_grad():
        cache = model(torch.from_numpy(calibration_tokens(settings, tiny_model(family))).long()).past_key_values
    found = load_file(tmp_path / "out/model.safetensors")
    for end, largest in (("k_scale", cache.layers[1].keys), ("v_scale", cache.layers[1].values)):
        (scale,) = [value for name, value in found.items() if ".1." in name and name.endswith(end)]
        assert float(scale) * 448 == pytest.approx(float(largest.abs().max()), rel=1e-2)


def test_scales_that_the_models_dtype_does_not_hold_are_left_out() -> None:
    from types import SimpleNamespace

    from hasten.compress.fold import into_norm

    norm, up = torch.nn.RMSNorm(3), torch.nn.Linear(3, 2, bias=False)
    block = SimpleNamespace(
        spec=SimpleNamespace(norm_offset=0.0, dtype="fp16"), norms={"mlp_norm": norm}, linears={"up": up}
    )
    x, before = torch.randn(4, 3), up.weight.clone()
    with torch.no_grad():
        expected = up(norm(x))
        into_norm(block, ("up",), torch.tensor([1e-6, 0.5, 1e9]))  # type: ignore[arg-type]
        torch.testing.assert_close(up(norm(x)), expected)
    torch.testing.assert_close(up.weight, before * torch.tensor([1, 0.5, 1]))


def test_tokens_from_a_file_and_what_is_wrong_with_them(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from hasten.compress.calibration import calibration_tokens

    model, file = tiny_model("llama"), tmp_path / "tokens.npy"
    settings = Calibration(str(file), num_sequences=2, sequence_len=8)

    def complaint() -> str:
        with pytest.raises(HastenError) as error:
            calibration_tokens(settings, model)
        return str(error.value)

    file.write_bytes(b"")
    assert "cannot read calibration tokens" in complaint()
    with open(file, "wb") as opened:
        np.savez(opened, np.ones(3))
    assert "an archive of arrays" in complaint()
    for token in (-1, 10**6):
        np.save(file, np.full((2, 8), token))
        assert f"has tokens from {token} to {token}, the model knows 0 to" in complaint()
    np.save(file, np.ones((3, 9), np.int64))
    assert calibration_tokens(settings, model).shape == (2, 8)
    settings = Calibration(str(file), num_sequences=2, sequence_len=100_000)
    assert "have 100000 tokens, the model at most" in complaint()


def test_of_a_long_text_parts_are_read(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.compress import calibration

    read_so_far = []
    plain = calibration.encode
    monkeypatch.setattr(calibration, "encode", lambda t, part: read_so_far.append(part) or plain(t, part))
    (tmp_path / "text.txt").write_text("".join(f"{number} " for number in range(20_000)))
    tokens = calibration.calibration_tokens(Calibration(str(tmp_path / "text.txt"), 4, 16), tiny_model("llama"))
    assert tokens.shape == (4, 16)
    assert sum(map(len, read_so_far)) < 5000
    assert read_so_far[0].startswith("0 1 2 ")
    assert read_so_far[-1].endswith(" 19999 ")


def test_text_that_is_not_read_whole_is_noted(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.compress import calibration

    monkeypatch.setattr(calibration, "_MOST", 1 << 12)
    monkeypatch.setattr(calibration, "_PARTS", 8)
    words = "".join(f"{number} \u00e4\u20ac\U0001f600 " for number in range(4000))
    (tmp_path / "long.txt").write_text(words, encoding="utf-8")
    notes: list[str] = []
    (found,) = read(str(tmp_path / "long.txt"), notes.append)
    size = len(words.encode())
    assert notes == [f"text {tmp_path}/long.txt has {size:,} bytes: 4,096 of them were read, evenly over it"]
    assert found.startswith("0 ")
    assert found.endswith("3999 \u00e4\u20ac\U0001f600 ")
    assert all(part in words for part in found.split("\n"))
    assert len(found.split("\n")) == 8
    receipt = compress(tiny_model("llama"), smooth(str(tmp_path / "long.txt")), tmp_path / "out", device="cpu")
    assert receipt.settings["calibration"]["notes"] == notes
    (tmp_path / "long.txt").write_bytes(words.encode() + b"\xff" * 4000)
    with pytest.raises(HastenError, match="cannot read calibration text"):
        list(read(str(tmp_path / "long.txt")))
    monkeypatch.setattr(calibration, "_MOST", 1 << 28)
    assert (
        "notes"
        not in compress(tiny_model("llama"), smooth(text), tmp_path / "two", device="cpu").settings["calibration"]
    )


def test_a_data_set_that_is_not_read_whole_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    import huggingface_hub

    from hasten.compress import calibration

    rows = [{"text": "some words"}] * 10
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: {"train": rows}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    notes: list[str] = []
    assert len(next(read("owner/name", notes.append)).split("\n")) == 10
    assert not notes
    monkeypatch.setattr(calibration, "_MOST_OF_A_DATA_SET", 25)
    assert len(next(read("owner/name", notes.append)).split("\n")) == 3
    assert notes == ["data set owner/name: its first 30 characters were read, and no more"]


def test_a_mistake_in_the_text_leaves_nothing_that_is_in_the_way(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    with pytest.raises(HastenError, match="there is no such file"):
        compress(tiny_model("llama"), smooth("misspelt"), tmp_path / "out", device="cpu")
    with pytest.raises(HastenError, match="there is no such file"):
        compress(tiny_model("llama"), smooth("word " * 200), tmp_path / "out", device="cpu")
    compress(tiny_model("llama"), smooth(text), tmp_path / "out", device="cpu")


def test_a_text_below_the_users_home_and_a_device_that_is_none(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(Path(text).parent))
    assert list(read("~/text.txt")) == list(read(text))
    with pytest.raises(HastenError, match="no calibration text at ~/texts: expected a file"):
        list(read("~/texts"))
    with pytest.raises(ResourceError, match="device is 'gpu', expected auto, cpu or cuda"):
        compress(tiny_model("llama"), smooth(text), tmp_path / "out", device="gpu")


def test_a_full_disk_is_said_in_one_line(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1 << 8, 1 << 14):  # of tokens, and of a block
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(ResourceError, match=r"out\.work.* cannot be written"):
                compress(tiny_model("llama"), smooth(text), tmp_path / "out", device="cpu")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_smoothing_changes_nothing_where_matrices_are_thin_and_a_router_chooses(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    calibration = Calibration(text, num_sequences=8, sequence_len=24)
    first = Recipe((SplitExperts(4, 2), Factorize(rank=16, targets=("attention",))), calibration=calibration)
    compress(tiny_model("llama"), first, tmp_path / "one", device="cpu")
    compress(tmp_path / "one", Recipe((Smooth(0.8),), calibration=calibration), tmp_path / "two", device="cpu")
    tokens = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, two = (load_torch(tmp_path / name)(tokens).logits for name in ("one", "two"))
    assert torch.allclose(one, two, atol=1e-4 * float(one.abs().max()))
    weights = [dict(open_checkpoint(tmp_path / name).weights())["layers.0.attn_norm"].data for name in ("one", "two")]
    assert not np.array_equal(*weights)
    with pytest.raises(RecipeError, match="rotate is for models without low-rank matrices and experts"):
        compress(tmp_path / "one", Recipe((Rotate(),)), tmp_path / "three", device="cpu")


def interrupted(model: Path, recipe: Recipe, out: Path, after: int = 2) -> None:
    """Work that was stopped where so many blocks were done."""

    def stop(done: int, total: int, what: str) -> None:
        if done == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(model, recipe, out, device="cpu", progress=stop)


def test_work_does_not_go_on_with_other_text(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    file, folder, model = tmp_path / "text.txt", tmp_path / "texts", tiny_model("llama")
    file.write_text(TEXT * 40)
    folder.mkdir()
    (folder / "one.txt").write_text(TEXT * 40)
    for text, changed in ((file, file), (folder, folder / "one.txt")):
        recipe, out = smooth(str(text)), tmp_path / f"out-{text.name}"
        interrupted(model, recipe, out)
        before = changed.read_text()
        changed.write_text(before.replace("wife", "life"))
        message = rf"{text} has changed since this work began: remove {out}\.work, or put it back"
        with pytest.raises(ResourceError, match=message):
            compress(model, recipe, out, device="cpu")
        changed.write_text(before)
        compress(model, recipe, out, device="cpu")


def test_of_a_long_text_what_is_read_has_a_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.compress import calibration

    monkeypatch.setattr(calibration, "_MOST", 1 << 10)
    monkeypatch.setattr(calibration, "_PARTS", 4)
    file = tmp_path / "long.txt"
    file.write_text(TEXT * 200)
    first = calibration.fingerprint(str(file))
    assert calibration.fingerprint(str(file)) == first
    file.write_text("X" + (TEXT * 200)[1:])
    assert calibration.fingerprint(str(file)) != first
    assert calibration.fingerprint("owner/name") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no calibration text at .*text.txt: expected a file"),
        (b" \n", "calibration text .*text.txt is empty: give text"),
        (b"\xff\xfe\x00\x01", "cannot read calibration text .*text.txt: .*: expected text in UTF-8"),
        (b"Too short.", "gives 0 sequences of 24 tokens, 8 are asked for"),
    ],
)
def test_text_is_checked_before_the_first_stage(
    content: bytes | None, message: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    told: list[str] = []
    recipe = Recipe((Rotate(), Smooth()), calibration=smooth(str(tmp_path / "text.txt")).calibration)
    with pytest.raises(HastenError, match=message):
        compress(
            tiny_model("llama"), recipe, tmp_path / "out", device="cpu", progress=lambda *call: told.append(call[2])
        )
    assert not told
    assert not (tmp_path / "out.work").exists()


def test_two_processes_do_not_work_in_one_folder(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    code = (
        "import sys; from hasten.compress.folder import compress\n"
        "def tell(done, total, what):\n"
        "    if done == 2: print('there', flush=True); sys.stdin.read()\n"
        "compress(sys.argv[1], sys.argv[2], sys.argv[3], device='cpu', progress=tell)\n"
    )
    model, recipe = tiny_model("llama"), tmp_path / "recipe.yaml"
    recipe.write_text(smooth(text).to_yaml())
    command = [sys.executable, "-c", code, str(model), str(recipe), str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"there\n"
        with pytest.raises(ResourceError, match=r"another process is working in .*out\.work: wait for it, or choose"):
            compress(model, recipe, tmp_path / "out", device="cpu")
        first.kill()
    compress(model, recipe, tmp_path / "out", device="cpu")  # a kill lets go of it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


@pytest.mark.parametrize("damage", ["empty", "cut"])
def test_a_damaged_block_and_those_behind_it_are_made_again(
    damage: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    compress(model, smooth(text), tmp_path / "whole", device="cpu")
    interrupted(model, smooth(text), tmp_path / "out")
    blocks = sorted((tmp_path / "out.work").rglob("block-*.npz"))
    assert len(blocks) == 2
    blocks[0].write_bytes(b"" if damage == "empty" else blocks[0].read_bytes()[:-300])
    gone: list[bool] = []
    compress(
        model, smooth(text), tmp_path / "out", device="cpu", progress=lambda *call: gone.append(blocks[1].exists())
    )
    assert gone[:3] == [True, False, True]  # before the first block, the second and the third
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_what_else_a_power_cut_leaves_empty_is_made_again(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    recipe = Recipe((Rotate(), *smooth(text).steps), calibration=smooth(text).calibration)
    interrupted(tiny_model("llama"), recipe, tmp_path / "out", after=5)
    work = tmp_path / "out.work"
    for name in ("calibration.npy", "work-0/found.json"):
        (work / name).write_bytes(b"")
    compress(tiny_model("llama"), recipe, tmp_path / "out", device="cpu")


def test_what_a_step_looked_up_is_looked_up_again_where_a_power_cut_left_it_empty(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    recipe, model = Recipe((Factorize(keep=0.8),), calibration=smooth(text).calibration), tiny_model("llama")
    interrupted(model, recipe, tmp_path / "out", after=3)
    (survey,) = (tmp_path / "out.work").rglob("survey-*.json")
    survey.write_bytes(b"")
    compress(model, recipe, tmp_path / "out", device="cpu")
    compress(model, recipe, tmp_path / "whole", device="cpu")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_text_alone_is_not_in_a_mended_recipes_way(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("hasten.compress.run"), "_run_stage", killed)
        with pytest.raises(KeyboardInterrupt):
            compress(tiny_model("llama"), smooth(text), tmp_path / "out", device="cpu")
    assert (tmp_path / "out.work/calibration.npy").is_file()
    longer = Recipe(smooth(text).steps, calibration=Calibration(text, num_sequences=10, sequence_len=32))
    receipt = compress(tiny_model("llama"), longer, tmp_path / "out", device="cpu")
    whole = compress(tiny_model("llama"), longer, tmp_path / "whole", device="cpu")
    assert receipt.settings["calibration"] == whole.settings["calibration"]


def test_seconds_are_those_of_all_runs(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    interrupted(tiny_model("llama"), smooth(text), tmp_path / "out")
    (tmp_path / "out.work/seconds").write_text("1000.5")
    receipt = compress(tiny_model("llama"), smooth(text), tmp_path / "out", device="cpu")
    assert 1000.5 < receipt.settings["seconds"] < 1400


def test_something_else_in_the_works_place_stays(tiny_model: Callable[..., Path], text: str, tmp_path: Path) -> None:
    work = tmp_path / "out.work"
    for make in (lambda: work.write_text("mine"), lambda: (work.unlink(), work.mkdir(), (work / "mine").touch())):
        make()
        with pytest.raises(ResourceError, match=r"out\.work is in the way, and is no unfinished work: remove it"):
            compress(tiny_model("llama"), smooth(text), tmp_path / "out", device="cpu")
    assert [path.name for path in work.iterdir()] == ["mine"]


def test_parts_that_a_model_has_not_are_not_recovered(
    tiny_model: Callable[..., Path], text: str, tmp_path: Path
) -> None:
    recipe = Recipe((Prune(), Recover(parts=("biases",), steps=2)), calibration=smooth(text).calibration)
    with pytest.raises(RecipeError, match="fits the parts biases, of which this model's layers have none: add weights"):
        compress(tiny_model("llama"), recipe, tmp_path / "out", device="cpu")
    assert not list(tmp_path.iterdir())
    compress(tiny_model("llama_bias"), recipe, tmp_path / "out", device="cpu")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_magnitudes_need_no_text(
    family: str, tiny_model: Callable[..., Path], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.compress import calibration

    monkeypatch.setattr(calibration, "generate", lambda *_: pytest.fail("the model wrote text"))
    model, settings = tiny_model(family), smooth(text).calibration
    for number, steps in enumerate(
        (
            (Prune(method="magnitude", targets=("mlp",)),),
            (Prune(method="magnitude", pattern="2:4"), Quantize("int8", 0, targets=("Linear", "head"))),
            (Rotate(), Prune(0.3, method="magnitude")),
        )
    ):
        one, two = tmp_path / f"one-{number}", tmp_path / f"two-{number}"
        assert compress(model, Recipe(steps), one, device="cpu").settings["calibration"] == {}
        compress(model, Recipe(steps, calibration=settings), two, device="cpu")
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()
