"""`tune` end to end on a real small model: proves what it writes, rejects what loses too much, resumes what was cut."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hasten import hardware
from hasten.backends.cpu import CpuBackend
from hasten.compress.plan import resolve
from hasten.engine.llm import LLM
from hasten.engine.request import SamplingParams
from hasten.errors import HastenError, RecipeError, ResourceError
from hasten.hardware import probe
from hasten.measure import energy
from hasten.measure.speed import Timing
from hasten.model.checkpoint import open_checkpoint
from hasten.model.tokenizer import Tokenizer
from hasten.receipt import Candidate, Quality, Receipt, plain
from hasten.recipe import Recipe, Run, presets
from hasten.steps import Quantize
from hasten.tune import choose, lab, proof, run, staged, texts, tune
from hasten.tune.lab import ORIGINAL, Lab, Timings
from hasten.tune.search import Search
from hasten.tune.state import State
from hasten.tune.texts import held_out

pytest.importorskip("hasten._core", reason="needs the compiled core (scripts/build.sh)")


@pytest.fixture(scope="module", autouse=True)
def short_runs() -> Iterator[None]:
    """Timings need only exist here, not be steady."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "_RUN_SECONDS", 0.005)
        patch.setattr(texts, "_WINDOWS", (8, 8))
        yield


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    return shared_data / "stories260K"


@pytest.fixture(scope="module")
def text(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "stories.txt"
    stories = (shared_data / "tinystories-slice" / "tinystories_slice.txt").read_text(encoding="utf-8")
    file.write_text(stories[:16_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def tuned(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Receipt, Path]:
    out = tmp_path_factory.mktemp("tuned") / "out"
    return tune(model, out, max_loss=0.02, goal="memory", data=text, rounds=2, transformers=False), out


def test_the_folder_is_what_the_receipt_says(tuned: tuple[Receipt, Path]) -> None:
    receipt, out = tuned
    assert Receipt.load(out) == receipt
    recipe = Recipe.load(out)
    assert recipe == receipt.recipe
    checkpoint = open_checkpoint(out)
    stored = {name: fmt for name, _, fmt in checkpoint.matrices()}
    for name, fmt in resolve(recipe, checkpoint.spec).formats.items():
        assert stored[name] == fmt, name
    assert checkpoint.config["hasten"]["run"]["kv_cache"] == recipe.run.kv_cache
    assert [path.name for path in out.parent.iterdir()] == ["out"], "nothing is left beside the folder"


def test_verdicts_follow_from_the_numbers(tuned: tuple[Receipt, Path]) -> None:
    receipt, _ = tuned
    verdicts = {candidate.verdict for candidate in receipt.candidates}
    assert {"chosen", "rejected"} <= verdicts <= {"chosen", "rejected", "accepted", "slower", "not tried"}
    for candidate in receipt.candidates:
        if candidate.verdict == "not tried":
            assert not candidate.decode
            assert candidate.predicted is not None
            assert candidate.reason
            continue
        assert candidate.search is not None
        assert candidate.search.loss is not None
        within = candidate.search.loss.high <= 0.02
        assert within or candidate.verdict == "rejected", candidate.name
        assert candidate.reason
    chosen = receipt.chosen
    assert chosen is not None
    assert chosen.verdict == "chosen"
    assert chosen.final is not None
    assert chosen.final.loss is not None
    assert chosen.final.loss.high <= 0.02
    assert chosen.final == receipt.quality
    assert chosen.ratio["memory"].median > 1
    for size, name in receipt.by_batch.items():
        assert (name == chosen.name) == (size not in choose.slower_at(chosen))


def test_numbers_are_consistent(tuned: tuple[Receipt, Path]) -> None:
    receipt, out = tuned
    assert receipt.original is not None
    assert receipt.original.search is not None
    assert receipt.original.search.divergence is not None
    assert receipt.original.search.divergence.median == 0
    for candidate in (receipt.original, *receipt.candidates):
        assert candidate.predicted is not None
        if candidate.verdict == "not tried":
            continue
        assert candidate.prefill is not None
        for value in (*candidate.decode.values(), *candidate.ratio.values(), candidate.prefill):
            assert 0 < value.low <= value.median <= value.high
        assert candidate.predicted.weight_bytes == candidate.weight_bytes == candidate.memory["weights"]
    assert receipt.original.memory["peak"] > 0
    assert set(receipt.inputs) >= {"model.safetensors", "config.json", "text"}
    assert all(len(value) == 64 for value in receipt.inputs.values())
    assert {sample.model for sample in receipt.samples} == {"original", receipt.choice}
    assert all(sample.text for sample in receipt.samples)
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert receipt.chosen is not None
    assert sum(sizes) < 1.6 * receipt.chosen.weight_bytes + 20_000


def test_formats_are_mixed_where_a_uniform_one_loses_too_much(tuned: tuple[Receipt, Path]) -> None:
    receipt, _ = tuned
    mixed = next(c for c in receipt.candidates if c.name.startswith("mixed-"))
    uniform = next(c for c in receipt.candidates if c.name == mixed.name.removeprefix("mixed-"))
    assert uniform.verdict == "rejected"
    assert mixed.search is not None
    assert mixed.search.loss is not None
    assert mixed.search.loss.high <= 0.02
    assert uniform.weight_bytes < mixed.weight_bytes < receipt.original.weight_bytes  # type: ignore[union-attr]
    assert receipt.sensitivity
    assert all(value.median >= 0 for value in receipt.sensitivity.values())


def test_no_loss_allowed_rejects_all_that_lose(model: Path, text: Path, tmp_path: Path) -> None:
    receipt = tune(model, tmp_path / "out", max_loss=0.0, data=text, rounds=1, transformers=False)
    for candidate in receipt.candidates:
        if "int4" in candidate.name and "keeps more and loses" not in candidate.reason:
            assert candidate.verdict == "rejected", candidate.name
    assert receipt.chosen is not None
    weights = {name: fmt.kind for name, _, fmt in open_checkpoint(tmp_path / "out").matrices()}
    assert "int4" not in weights.values()


def test_a_killed_run_goes_on_and_measures_nothing_twice(model: Path, text: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle: what the state holds then is in the receipt, number by number."""
    out, state = tmp_path / "out", tmp_path / "out.tune.json"
    script = f"""
from hasten.tune import texts, tune
texts._RUN_SECONDS, texts._WINDOWS = 0.005, (8, 8)
tune({str(model)!r}, {str(out)!r}, data={str(text)!r}, rounds=1, transformers=False)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    while not (state.exists() and "int8" in finished(state)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not out.exists()
    before = finished(state)
    measured: list[str] = []
    real = Lab.measure

    def watched(self: Lab, recipes: Mapping[str, Recipe], *more: Any) -> dict[str, Candidate]:
        measured.extend(recipes)
        return real(self, recipes, *more)

    def again(*more: Any) -> None:
        raise AssertionError("what the run stands on is fixed when it begins")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lab, "measure", watched)
        patch.setattr(run, "held_out", again)
        patch.setattr(run, "workload_sizes", again)
        receipt = tune(model, out, data=text, rounds=1, transformers=False)
    assert measured, "there was something left to do"
    retimed = {c.name for c in receipt.candidates if c.final is not None}
    assert not (set(measured) - retimed) & set(before)
    found = {candidate.name: candidate for candidate in (receipt.original, *receipt.candidates) if candidate}
    for name, kept in before.items():
        assert name in retimed or plain(found[name].decode) == kept["decode"]
        assert plain(found[name].search) == kept["search"]
    assert not state.exists()


def finished(state: Path) -> dict[str, Any]:
    """Candidates in a state file, which is never half-written."""
    parts: dict[str, Any] = json.loads(state.read_text())["parts"].get("candidates", {})
    return parts


def test_time_that_is_over_leaves_the_rest_untried(model: Path, text: Path, tmp_path: Path) -> None:
    receipt = tune(model, tmp_path / "out", data=text, minutes=0.001, rounds=1, transformers=False)
    untried = [c for c in receipt.candidates if c.verdict == "not tried"]
    assert any("no time was left" in c.reason for c in untried)
    assert len(receipt.candidates) > len(untried) >= 1, "a few are always measured"
    assert receipt.settings["minutes"] == 0.001
    assert receipt.settings["seconds"] > 0.06
    assert receipt.settings["passages"] == {"search": 8, "proof": 8}


def test_energy_is_in_the_receipt_where_it_can_be_read(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = tmp_path / "energy_uj"
    counter.write_text("0")
    reading = iter(range(0, 10**9, 10**6))  # a joule between any two readings
    monkeypatch.setattr(hardware, "energy_counters", lambda: [counter])
    monkeypatch.setattr(energy, "energy_counters", lambda: [counter])
    monkeypatch.setattr(energy, "_microjoules", lambda path: next(reading))
    monkeypatch.setattr(lab, "_ENERGY_SECONDS", 0.01)
    receipt = tune(
        model, tmp_path / "out", data=text, max_loss=0.02, goal="memory", minutes=0.001, rounds=1, transformers=False
    )
    assert receipt.original is not None
    assert receipt.chosen is not None
    for candidate in (receipt.original, receipt.chosen):
        assert candidate.energy is not None
        assert candidate.energy["1"] > candidate.energy["8"] > 0
    assert not any("energy" in note for note in receipt.notes)


def test_recipes_with_the_same_weights_share_them(model: Path) -> None:
    made: list[CpuBackend] = []

    def make(threads: int) -> CpuBackend:
        made.append(CpuBackend(threads))
        return made[-1]

    laboratory = Lab(open_checkpoint(model), probe(0.02), 1, make)
    int8 = presets()["int8"]
    ways = {
        "plain": int8,
        "kv": replace(int8, run=Run(kv_cache="int8")),
        "ngram": replace(int8, run=Run(None, "ngram")),
    }
    backends = laboratory.load({"original": Recipe(), **ways})
    assert len(made) == 2
    assert backends["plain"] is backends["kv"] is backends["ngram"]
    assert laboratory.load({"original": Recipe()})["original"] is made[0]
    laboratory.load({"plain": int8})
    assert len(made) == 3, "what is not measured any more was dropped"


def test_a_state_of_other_inputs_is_not_used(model: Path, text: Path, tmp_path: Path) -> None:
    one = State(tmp_path / "s.json", {"max_loss": 0.01})
    one.put("candidates", "int8", {"a": 1})
    assert State(tmp_path / "s.json", {"max_loss": 0.01}).get("candidates", "int8") == {"a": 1}
    assert State(tmp_path / "s.json", {"max_loss": 0.02}).get("candidates", "int8") is None
    assert State(tmp_path / "s.json", {"max_loss": 0.02}).ignored.startswith("s.json was not gone on with")
    assert State(tmp_path / "s.json", {"max_loss": 0.01}).ignored == ""
    (tmp_path / "s.json").write_text("{half")
    half = State(tmp_path / "s.json", {"max_loss": 0.01})
    assert half.section("") == {}
    assert half.ignored
    assert State(tmp_path / "none.json", {}).ignored == ""


def test_the_folder_says_what_the_receipt_says_it_does(tuned: tuple[Receipt, Path]) -> None:
    receipt, out = tuned
    sample = next(sample for sample in receipt.samples if sample.model == receipt.choice)
    llm = LLM(out)
    found = llm.generate([sample.prompt], SamplingParams(max_tokens=64, temperature=0.0))[0].outputs[0]
    assert Tokenizer(out).decode(found.token_ids) == sample.text


def test_the_proof_reads_the_folder_as_it_is_written(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that writes something else: what is in memory is good, what is on disk is not, and the proof says so."""
    real, bad = staged.write_folder, Recipe((Quantize("int4", 64, fallback="int8"),))

    def spoiled(out: Path, checkpoint: Any, recipe: Recipe, *more: Any) -> None:
        real(out, checkpoint, replace(bad, run=recipe.run) if recipe.steps else recipe, *more)

    monkeypatch.setattr(staged, "write_folder", spoiled)
    receipt = tune(model, tmp_path / "out", data=text, goal="memory", max_loss=0.02, rounds=1, transformers=False)
    judged = [c for c in receipt.candidates if c.final is not None and c.recipe.steps]
    assert judged
    for c in judged:
        assert c.verdict == "rejected"
        assert "on the text kept for the proof" in c.reason
        assert c.search is not None
        assert c.search.loss is not None
        assert c.search.loss.high <= 0.02


def test_a_lucky_measurement_is_not_reported(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate is timed 1.06x in the search and turns out as fast as the original when timed again."""
    real = Lab.time

    def lucky(self: Lab, recipes: Mapping[str, Recipe], workloads: Mapping[str, Any], rounds: int) -> Timings:
        found = real(self, recipes, workloads, min(rounds, 1))
        factor = 1.06 if rounds < proof.ROUNDS else 1.0
        noise = [1 + 0.01 * (-1) ** index for index in range(rounds)]
        return {
            (name, key): [Timing(100 * value * (1 if name == ORIGINAL else factor), 100, 1) for value in noise]
            if name == ORIGINAL
            else [Timing(100 * factor, 100, 1) for _ in noise]
            for name, key in found
        }

    monkeypatch.setattr(Lab, "time", lucky)
    receipt = tune(model, tmp_path / "out", data=text, max_loss=0.02, rounds=1, transformers=False)
    assert receipt.choice == ORIGINAL
    assert "surely" in receipt.reason
    again = [c for c in receipt.candidates if "when timed again" in c.reason]
    assert again
    for c in again:
        assert c.verdict == "slower"
        assert c.ratio["1"].n == proof.ROUNDS
    assert not (tmp_path / ".out.staged").exists()


def test_ways_of_running_are_tried_on_what_was_proven(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best format fails the proof: no way of running it is looked at, but ways of the next that holds."""
    real = Search.quality

    def first_fails(self: Search, section: str, name: str, *more: Any) -> Quality:
        found = real(self, section, name, *more)
        if section == "final" and len(self.state.section("final")) == 1:
            assert found.loss is not None
            return replace(found, loss=replace(found.loss, high=0.5))
        return found

    monkeypatch.setattr(Search, "quality", first_fails)
    receipt = tune(model, tmp_path / "out", data=text, goal="memory", max_loss=0.02, rounds=1, transformers=False)
    failed = next(c for c in receipt.candidates if c.final is not None and c.verdict == "rejected")
    assert not [c for c in receipt.candidates if c.name.startswith(f"{failed.name} ")]
    proven = [c for c in receipt.candidates if c.final is not None and c.verdict in ("chosen", "accepted")]
    base = min(proven, key=lambda c: len(c.name))
    assert [c for c in receipt.candidates if c.name.startswith(f"{base.name} ")]
    assert base.final is not None
    assert receipt.settings["proof"]["tried_on_text"] >= 2
    assert base.final.confidence == choose.confidence(2)


def test_a_model_judges_itself_on_its_own_text_where_no_other_fits(model: Path, tmp_path: Path) -> None:
    laboratory = Lab(open_checkpoint(model), probe(0.02), 2, CpuBackend)
    first, second = (held_out(laboratory, Tokenizer(model), 60) for _ in range(2))
    assert "the model wrote" in first.source
    assert first.sha256 == second.sha256, "seeded"
    assert len(first.search) >= 8
    assert len({window.tokens.tobytes() for window in (*first.search, *first.final)}) == len(first.search) + len(
        first.final
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"goal": "speed"}, RecipeError, "goal is 'speed'.* expected one of latency"),
        ({"max_loss": 2}, RecipeError, "max_loss is 2"),
        ({"rounds": 0}, RecipeError, "rounds is 0"),
        ({"minutes": 0}, RecipeError, "minutes is 0"),
        (
            {"data": "short.txt"},
            HastenError,
            "short.txt: the text gives 1 windows of 256 tokens, at least 16 are needed",
        ),
        ({"data": "nowhere.txt"}, HastenError, "cannot read text nowhere.txt"),
    ],
)
def test_wrong_arguments(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("Once upon a time there was a little dog.")
    with pytest.raises(error, match=message):
        tune(model, tmp_path / "out", transformers=False, **changes)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_an_existing_folder_is_not_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ResourceError, match="exists already"):
        tune(model, tmp_path / "out", transformers=False)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="choose another"):
        tune(model, tmp_path / "file" / "none" / "out", transformers=False)


def test_a_receipt_of_another_schema_is_refused(tuned: tuple[Receipt, Path]) -> None:
    receipt, _ = tuned
    with pytest.raises(HastenError, match="schema 99, expected 1"):
        Receipt.from_json(replace(receipt, schema=99).to_json())
    assert isinstance(receipt.candidates[0], Candidate)
