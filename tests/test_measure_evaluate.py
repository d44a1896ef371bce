"""evaluate: several texts, tasks and speed in one receipt; text that made the model is refused; bad input in a line."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import hasten

from hasten import Finetune, Recipe, compress, evaluate
from hasten.compress.calibration import calibration_tokens, digest
from hasten.errors import HastenError, ModelError
from hasten.measure import overlap
from hasten.measure.overlap import check_unseen, shared_runs
from hasten.measure.rounding import notes_on_rounding
from hasten.model.checkpoint import open_checkpoint
from hasten.receipt import Measurement, Receipt, Speed, UsedText, used_texts
from hasten.recipe import Calibration
from hasten.steps import Quantize, QuantizeKv

WORDS = [f"{'aeiou'[n % 5]}{'bcdfg'[n // 5 % 5]}{'lmnrt'[n // 25 % 5]}{n // 125 or ''}" for n in range(400)]
TEXT = " ".join(WORDS) + ".\n"


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "stories260K"


@pytest.fixture(scope="module")
def heldout(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "held.txt"
    path.write_text((shared_data / "tinystories-slice" / "tinystories_slice.txt").read_text()[-12_000:])
    return path


def made_with(folder: Path, tmp_path: Path, calibration: Calibration, sha256: str) -> Path:
    """A copy of the model whose receipt says what it was calibrated on."""
    copy = tmp_path / "made"
    shutil.copytree(folder, copy)
    copy.chmod(0o755)
    about = {**{key: getattr(calibration, key) for key in ("text", "num_sequences", "sequence_len", "seed")}}
    recipe = Recipe((Finetune(text=str(tmp_path / "tuned.txt")),))
    Receipt("compress", "m", "now", {}, {}, {}, {}, recipe, settings={"calibration": {**about, "sha256": sha256}}).save(
        copy / "receipt.json"
    )
    return copy


def test_shared_runs_of_words() -> None:
    assert shared_runs(TEXT, [TEXT.upper()]) == 1
    assert shared_runs(TEXT, ["nothing of it", ""]) == 0
    assert shared_runs("too short", [TEXT]) == 0
    halves = " ".join(WORDS[:206]), " ".join(WORDS[206:])
    assert shared_runs(TEXT, halves[:1]) == pytest.approx(194 / 388)
    assert shared_runs(TEXT, halves) == pytest.approx((194 + 182) / 388)  # what several texts hold counts together


def test_training_text_in_any_form_is_looked_through(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_with(stories, tmp_path, Calibration(None), "")
    other = tmp_path / "other.txt"
    other.write_text(TEXT)
    share, note = check_unseen("other", other, TEXT, folder)
    assert share is None
    assert note is not None
    assert "was not compared with" in note
    assert "tuned.txt" in note
    (tmp_path / "tuned.txt").mkdir()  # a folder
    (tmp_path / "tuned.txt/part.md").write_text(TEXT * 20)
    monkeypatch.setattr(overlap, "_PIECE", 1 << 12)  # of a file larger than this
    with pytest.raises(HastenError, match="100% of its runs of 13 words"):
        check_unseen("other", other, TEXT, folder)


def test_text_that_a_model_was_calibrated_on_is_refused(stories: Path, heldout: Path, tmp_path: Path) -> None:
    calibration = Calibration(str(tmp_path / "gone.txt"), 4, 64)
    used = Calibration(str(heldout), 4, 64)
    folder = made_with(stories, tmp_path, calibration, digest(calibration_tokens(used, stories)))
    with pytest.raises(HastenError, match=r"text held is what .* was calibrated on"):
        check_unseen("held", heldout, heldout.read_text(), folder)
    other = tmp_path / "other.txt"
    other.write_text(TEXT * 3)
    # Text of training that is still there is looked through.
    (tmp_path / "tuned.txt").write_text(TEXT)
    with pytest.raises(HastenError, match="100% of its runs of 13 words"):
        check_unseen("other", other, TEXT, folder)
    mixed = " ".join([*WORDS[:30], *reversed(WORDS)])
    share, note = check_unseen("mixed", other, mixed, folder)
    assert share == pytest.approx(18 / 418, rel=0.1)
    assert note is not None
    assert "mixed" in note
    share, note = check_unseen("fresh", other, "nothing of it", folder)
    assert share == 0
    assert note is not None
    assert "gone.txt, which made made: it is not here" in note
    assert check_unseen("fresh", other, TEXT, stories) == (None, None)  # nothing is known of that folder


def test_text_that_made_the_model_before_is_refused_too(stories: Path, heldout: Path, tmp_path: Path) -> None:
    """Through a chain of folders: by the sequences' hash where the text was moved, by its words where it is there."""
    seen = Calibration(str(tmp_path / "gone.txt"), 4, 64)
    sha256 = digest(calibration_tokens(Calibration(str(heldout), 4, 64), stories))
    first = made_with(stories, tmp_path, seen, sha256)
    for name, source in (("second", first), ("third", tmp_path / "second")):
        receipt = compress(source, "int8", tmp_path / name)
        assert Receipt.load(tmp_path / name) == receipt
    about = {"text": seen.text, "num_sequences": 4, "sequence_len": 64, "seed": 0, "sha256": sha256}
    assert receipt.made_from == (UsedText(about, (str(tmp_path / "gone.txt"), str(tmp_path / "tuned.txt"))),)
    third = tmp_path / "third"
    with pytest.raises(HastenError, match=r"text held is what .*third was calibrated on"):
        check_unseen("held", heldout, heldout.read_text(), third)
    (other := tmp_path / "other.txt").write_text(TEXT * 3)
    assert "gone.txt, " in str(check_unseen("other", other, TEXT, third)[1])
    (tmp_path / "tuned.txt").write_text(TEXT)
    with pytest.raises(HastenError, match=r"text other is in what .*third was made with"):
        evaluate(third, data={"other": other})


def test_texts_of_a_chain_are_listed_oldest_first(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(TEXT * 3)
    (tmp_path / "two.txt").write_text(TEXT * 2)
    for name, source in (("one", stories), ("two", tmp_path / "one")):
        text = Calibration(str(tmp_path / f"{name}.txt"))
        receipt = compress(source, "int8", tmp_path / name)  # which reads no text: the receipt says that it did
        replace(receipt, recipe=Recipe((Quantize(method="gptq"),), calibration=text)).save(
            tmp_path / name / "receipt.json"
        )
    used = used_texts(tmp_path / "two")
    assert [Path(text.named[0]).name for text in used] == ["one.txt", "two.txt"]


def test_receipts_from_before_load_and_what_is_none_is_said(stories: Path, tmp_path: Path) -> None:
    compress(stories, "int8", tmp_path / "one")
    file = tmp_path / "one/receipt.json"
    old = json.loads(file.read_text())
    assert old.pop("made_from") == []
    file.write_text(json.dumps(old))
    assert used_texts(file.parent) == ()
    old["recipe"] = {"steps": [{"factorize": {"keep": 0.5, "rank": 8, "text": "was.txt"}}]}  # once taken, now refused
    file.write_text(json.dumps(old))
    assert used_texts(file.parent) == (UsedText({}, ("was.txt",)),)
    file.write_text("{}")
    with pytest.raises(ModelError, match=r"receipt\.json should say which texts made the model: .* or remove it$"):
        compress(tmp_path / "one", "int8", tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_texts_tasks_and_speed_are_in_the_receipt(stories: Path, heldout: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.txt").write_text(TEXT * 8)
    rows = [{"prompt": "Once upon a", "choices": ["time", "xylophone"], "answer": 0}] * 6
    (tmp_path / "time.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "".join(json.dumps({"text": "Once upon a time"}) + "\n" for _ in range(6))
    (tmp_path / "last.jsonl").write_text(words)
    receipt = evaluate(
        stories,
        stories,
        {"stories": heldout, "noise": tmp_path / "noise.txt"},
        tasks={"time": tmp_path / "time.jsonl", "last": tmp_path / "last.jsonl"},
        num_shots=1,
        speed=True,
        window=64,
        max_windows=12,
        device="cpu",
    )
    assert list(receipt.texts) == ["stories", "noise"]
    assert receipt.quality == receipt.texts["stories"]
    assert receipt.texts["noise"].bits_per_byte.median > 1.5 * receipt.texts["stories"].bits_per_byte.median
    assert {"text stories", "text noise"} <= receipt.inputs.keys()
    assert receipt.quality is not None
    assert receipt.quality.flips is not None
    assert receipt.quality.flips.median == 0
    for task in receipt.tasks.values():
        assert task.num_questions == 5
        assert task.accuracy.median == 1
        assert task.change is not None
        assert task.change.median == 0
    for speed in receipt.speed.values():
        assert speed.decode["1"].median > 0
        assert speed.memory["peak"] > speed.memory["weights"] > 0
    assert receipt.speed["against"].ratio["8"].median == 1
    assert Receipt.from_json(receipt.to_json()) == receipt


def test_a_form_that_is_slower_than_the_original_is_noted(
    stories: Path, heldout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, slow = Measurement(80, 79, 81, 6, "tokens/s"), Measurement(0.8, 0.79, 0.81, 6, "times")
    found = {"model": Speed({"1": decode, "8": decode}, {"1": replace(slow, high=1.01), "8": slow}, {})}
    monkeypatch.setattr(sys.modules["hasten.measure.evaluate"], "_speed", lambda *_: found)
    receipt = evaluate(stories, stories, heldout, speed=True, window=64, max_windows=4, device="cpu")
    assert receipt.notes == ("with 8 streams 0.80x of stories260K: this form does not pay there",)


def test_models_that_read_a_text_as_other_tokens_are_not_compared(stories: Path, heldout: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(stories, other)
    other.chmod(0o755)
    tokenizer = json.loads((stories / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    (other / "tokenizer.json").unlink()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"read text held as other tokens: only models that share a tokenizer"):
        evaluate(other, stories, heldout, window=64, max_windows=4, device="cpu")


def test_the_command_shows_texts_side_by_side(stories: Path, heldout: Path, tmp_path: Path) -> None:
    (tmp_path / "noise.txt").write_text(TEXT * 8)
    rows = [{"prompt": "Once upon a", "choices": ["time", "xylophone"], "answer": 0}] * 6
    (tmp_path / "time.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--against", stories, "--data", f"near={heldout}", "--data", tmp_path / "noise.txt", "--window", 64]
    shown = hasten("evaluate", stories, *flags, "--task", tmp_path / "time.jsonl").good.stdout
    assert shown.splitlines()[0].split() == ["near", "noise"]
    for word in ("bits per byte", "right to wrong", "answers changed", "100.0%"):
        assert word in shown


def test_what_cannot_be_evaluated_is_said_in_a_line(stories: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "short.txt").write_text("Once upon a time.")
    (tmp_path / "odd.jsonl").write_text('{"question": "?"}\n')
    for flags, complaint in [
        (["--data", tmp_path / "nowhere.txt"], "cannot read text"),
        (["--data", tmp_path / "empty.txt"], "empty.txt is empty"),
        (["--data", tmp_path / "short.txt"], "short.txt: the text gives 1 windows of 512 tokens, at least 4"),
        (["--task", tmp_path / "nowhere.jsonl"], "cannot read task"),
        (["--task", tmp_path / "odd.jsonl"], "line 1 has question: expected prompt, choices and answer"),
        (["--data", f"a={tmp_path}/short.txt", "--data", f"a={tmp_path}/empty.txt"], "two files named a"),
    ]:
        assert complaint in hasten("evaluate", stories, *flags).complaint


def test_a_declared_rounding_that_is_not_done_is_noted(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    floats = "inputs are declared fp8 and are not rounded here: other engines will lose more"
    integers = (
        "inputs are declared int8 with a scale a token, and are rounded here with one for 128 numbers and in part to "
        "16 bits: other engines may lose more"
    )
    for steps, note in (
        ((Quantize("fp8", activations="fp8"),), (floats,)),
        ((Quantize("int8", 0, activations="int8"),), (integers,)),
        ((Quantize("int8", 0),), ()),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        compress(tiny_model("llama"), Recipe(steps), out, device="cpu")
        found = notes_on_rounding(open_checkpoint(out), "cpu", "fp32")
        assert found == note
        assert not any("fp8" in line for line in notes_on_rounding(open_checkpoint(out), "cuda", "bf16"))


def test_declared_rounding_is_in_the_receipt_and_shown(stories: Path, heldout: Path, tmp_path: Path) -> None:
    recipe = Recipe(
        (Quantize("fp8", activations="fp8-static"), QuantizeKv()), calibration=Calibration(str(heldout), 4, 32)
    )
    compress(stories, recipe, tmp_path / "fp8", device="cpu")
    (tmp_path / "noise.txt").write_text(TEXT * 8)
    shown = hasten("evaluate", tmp_path / "fp8", "--data", tmp_path / "noise.txt", "--window", 64).good
    assert "inputs are declared fp8 and are not rounded here: other engines will lose more" in shown.stderr
    assert "keys and values are declared fp8 with scales, and are kept in fp32 without them here" in shown.stderr
    onto_gpu = notes_on_rounding(open_checkpoint(tmp_path / "fp8"), "cuda", "fp8")
    assert "with a scale known beforehand, and are rounded with one a token here" in onto_gpu[0]


def test_one_window_has_no_interval(stories: Path, heldout: Path) -> None:
    flags = ["--against", stories, "--data", heldout, "--max-windows", 1]
    shown = hasten("evaluate", stories, *flags).good
    assert " to " not in shown.stdout.replace("right to wrong", "").replace("wrong to right", "")
    assert "one window of text gives no intervals: take more windows" in shown.stderr
    receipt = Receipt.from_json(hasten("evaluate", stories, *flags, "--json").good.stdout)
    assert receipt.quality is not None
    assert receipt.quality.bits_per_byte.low == receipt.quality.bits_per_byte.high > 0
