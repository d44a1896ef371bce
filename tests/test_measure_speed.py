"""Timings: what is counted, in which order, in which process; and evaluate on a real model."""

from pathlib import Path

import pytest

from hasten import Recipe, compress, evaluate
from hasten.engine.llm import LLM
from hasten.engine.request import SamplingParams
from hasten.errors import HastenError, ModelError
from hasten.measure.memory import peak_memory, run_fresh
from hasten.measure.speed import Timing, Workload, interleave, make_engine, prompts_from, time_workload
from hasten.measure.transformers_worker import TransformersWorker
from hasten.model.checkpoint import open_checkpoint
from hasten.recipe import Run
from hasten.steps import Quantize


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    pytest.importorskip("hasten._core", reason="needs the compiled core (scripts/build.sh)")
    return shared_data / "stories260K"


def test_rounds_are_interleaved_and_no_one_always_goes_first() -> None:
    order: list[str] = []

    def run(name: str) -> Timing:
        order.append(name)
        return Timing(len(order), 1, 1)

    found = interleave({name: (lambda name=name: run(name)) for name in "abc"}, 3)  # type: ignore[misc]
    assert order == list("abc" + "abc" + "bca" + "cab")
    assert [timing.decode for timing in found["a"]] == [4, 9, 11]


def test_prompts_differ_and_have_their_length() -> None:
    prompts = prompts_from(range(40), 8, 16)
    assert {len(prompt) for prompt in prompts} == {16}
    assert len(set(prompts)) == 8
    assert prompts_from([1, 2, 3], 2, 5)[0] == (1, 2, 3, 1, 2)


def test_more_streams_give_more_tokens_and_repeats_start_afresh(model: Path) -> None:
    from hasten.backends.cpu import CpuBackend

    checkpoint = open_checkpoint(model)
    backend = CpuBackend(1)
    backend.load(checkpoint.spec, checkpoint.weights())
    engine = make_engine(checkpoint.spec, backend, Run(), 8, 80)
    one = time_workload(engine, Workload(prompts_from(range(3, 60), 1, 16), 64, min_seconds=0.05))
    eight = time_workload(engine, Workload(prompts_from(range(3, 60), 8, 16), 64, min_seconds=0.05))
    assert eight.decode > one.decode > 0
    once = time_workload(engine, Workload(prompts_from(range(3, 60), 2, 16), 4))
    assert once.prefill == pytest.approx(2 * 16 / once.ttft)


def test_transformers_runs_in_its_own_process(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with TransformersWorker(model, 1) as worker:
        timing = worker.time(Workload(prompts_from(range(3, 60), 2, 16), 4))
        assert worker.peak_memory() > 50 << 20
    assert timing.decode > 0
    assert timing.prefill > 0
    assert "torch" in worker.versions
    with pytest.raises(HastenError, match="Transformers cannot run this model"):
        TransformersWorker(tmp_path, 1)


def test_peak_memory_is_of_a_fresh_process(model: Path, tmp_path: Path) -> None:
    peak = peak_memory(model, [1, 403], 1)
    assert 10 << 20 < peak < 400 << 20
    tokens = run_fresh(model, [1, 403], 1).tokens
    found = LLM(model).generate([[1, 403]], SamplingParams(max_tokens=64, temperature=0.0))[0].outputs[0]
    assert tokens == list(found.token_ids)
    with pytest.raises(HastenError, match="does not run in a fresh process"):
        peak_memory(tmp_path, [1], 1)


def test_int8_hardly_differs_and_int4_does(model: Path, shared_data: Path, tmp_path: Path) -> None:
    """Agreement does not reach 99 % on a model of 260,032 parameters whose hidden state has 64 numbers: rounding its
    weights to bf16 alone gives 99.4 %, and int8 rounds several times as coarsely."""
    text = shared_data / "tinystories-slice" / "tinystories_slice.txt"
    found = {}
    for name in ("int8", "int4"):
        compress(model, Recipe((Quantize(name, targets=("Linear", "head"), fallback="int8"),)), tmp_path / name)
        found[name] = evaluate(tmp_path / name, model, text, max_windows=32).quality
    int8, int4 = found["int8"], found["int4"]
    assert int8 is not None
    assert int4 is not None
    assert int8.loss is not None
    assert int8.top1_agreement is not None
    assert int8.divergence is not None
    assert int4.loss is not None
    assert int4.divergence is not None
    assert int8.loss.median < 0.003
    assert int8.top1_agreement.median > 0.96
    assert int4.loss.median > 5 * abs(int8.loss.median)
    assert int4.divergence.median > 10 * int8.divergence.median
    assert int8.num_blocks == 32


def test_models_of_other_vocabularies_are_not_compared(model: Path, tiny_model: object) -> None:
    with pytest.raises(ModelError, match="vocabularies of 512 and 307"):
        evaluate(model, tiny_model("llama"))  # type: ignore[operator]
