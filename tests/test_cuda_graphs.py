"""Which steps run as graphs: buckets, those that stand in for others, and captures without a step of their own. Replays
are stood in for by running the step in Triton's interpreter; captures themselves are tested on a GPU."""

import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels run on the GPU here: see tests/gpu", allow_module_level=True)

from cuda_tools import batch, fetched, load  # noqa: E402

from hasten.backends.base import Batch  # noqa: E402
from hasten.backends.cuda import graphs as module  # noqa: E402
from hasten.backends.cuda.decoder import Decoder  # noqa: E402
from hasten.backends.cuda.graphs import Graphs  # noqa: E402

TOKENS = np.random.default_rng(0).integers(3, 300, 40).astype(np.int32)


class Played(Graphs):
    """Captures that only note what is to be run. fails: those of buckets that have not run."""

    fails = False

    def _capture(self, bucket) -> None:  # type: ignore[no-untyped-def]
        if self.fails and not bucket.ran:
            bucket.must_run, bucket.asked = True, False
            return

        def replay() -> None:
            bucket.logits, bucket.hidden = self._run(bucket)

        bucket.graph = SimpleNamespace(replay=replay)


@pytest.fixture
def graphs(tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(module, "_STAND_INS", dict.fromkeys(module._STAND_INS, 2))
    backend = load(tiny_model("qwen3", num_hidden_layers=1), "cpu")
    made = Played(
        backend._decoder, backend._sampler, backend._stager, 4, 64, 16, 64, backend._rehearse  # type: ignore[arg-type]
    )  # fmt: skip
    made.backend = backend  # type: ignore[attr-defined]
    return made


def decodes(count: int) -> Batch:
    return batch([(TOKENS[i : i + 1], 0, np.arange(4 * i, 4 * i + 4, dtype=np.int32)) for i in range(count)])


def run(graphs, count: int) -> np.ndarray:  # type: ignore[no-untyped-def]
    got, chosen = graphs(decodes(count))
    graphs.finish()
    assert chosen
    return np.array(got)


def test_a_bucket_that_comes_often_is_captured_without_running(graphs) -> None:  # type: ignore[no-untyped-def]
    want = fetched(graphs.backend, decodes(4))
    for count in (4, 2, 2, 2, 1, 1):
        got = run(graphs, count)
        np.testing.assert_allclose(got, want[:count], atol=1e-5)
    found = {size: (bucket.ran, bucket.graph is not None) for (_, size), bucket in graphs._buckets.items()}
    assert found == {4: (True, True), 2: (False, True), 1: (False, False)}
    run(graphs, 1)
    graphs._pool = "that of graphs"
    assert graphs._buckets["decodes", 1].ran  # other kernels than those of several rows
    graphs.forget()
    assert graphs._pool is None  # torch refuses one that no graph uses any more


def test_few_long_sequences_get_graphs_of_their_own(graphs) -> None:  # type: ignore[no-untyped-def]
    """Those for short ones stand in at first."""
    want = run(graphs, 2)
    graphs._few_keys = 0
    for _ in range(2):
        np.testing.assert_array_equal(run(graphs, 2), want)
        assert graphs._buckets["long", 2].graph is None
    run(graphs, 2)
    long = graphs._buckets["long", 2]
    assert long.graph is not None
    assert not long.ran
    assert (long.inputs.few, graphs._buckets["decodes", 2].inputs.few) == (False, True)
    np.testing.assert_allclose(run(graphs, 2), want, atol=1e-5)


def test_where_that_fails_it_runs_first(graphs) -> None:  # type: ignore[no-untyped-def]
    graphs.fails = True
    for count in (4, 2, 2, 2):
        run(graphs, count)
    assert not graphs._buckets["decodes", 2].ran
    run(graphs, 2)
    assert graphs._buckets["decodes", 2].ran
    assert graphs._buckets["decodes", 2].graph is not None


def test_what_is_dropped_waits_for_no_lock_that_its_owner_holds(graphs) -> None:  # type: ignore[no-untyped-def]
    """A backend may be collected while another one loads, which holds the lock that captures need."""
    begun = Event()

    def waits() -> None:
        begun.set()
        with module.CAPTURING:
            pass

    job = graphs._thread.submit(waits)
    with module.CAPTURING:
        assert begun.wait(10)
        graphs.close()
    job.result(10)
    graphs.close()


def test_decodes_that_follow_a_long_prompt_are_rehearsed_as_long_ones(graphs) -> None:  # type: ignore[no-untyped-def]
    graphs._few_keys = 20
    graphs(batch([(TOKENS[:30], 0, np.arange(4, dtype=np.int32))]))
    assert set(graphs._buckets) == {("any", 32), ("long", 1)}


def test_new_steps_are_rehearsed_once_and_change_nothing(graphs, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    rehearsed = []
    original = Decoder.rehearse

    def noted(decoder, inputs, rows):  # type: ignore[no-untyped-def]
        rehearsed.append(len(inputs.tokens))
        graphs._sampler.sampled.fill_(-5)
        logits = original(decoder, inputs, rows)
        graphs._sampler.greedy(logits)
        assert (graphs._sampler.sampled == -5).all()  # nothing has run
        return logits

    monkeypatch.setattr(Decoder, "rehearse", noted)
    graphs(batch([(TOKENS[:30], 0, np.arange(4, dtype=np.int32))]))
    assert sorted(rehearsed) == [1, 32]  # a prompt, and the decode that follows it
    assert set(graphs._buckets) == {("any", 32), ("decodes", 1)}
    run(graphs, 1)
    run(graphs, 3)
    run(graphs, 4)
    assert sorted(rehearsed) == [1, 4, 32]
    device, interrupted = graphs._decoder.device, pytest.raises(KeyboardInterrupt)
    with interrupted:
        device.rehearse(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    graphs._sampler.sampled.fill_(-5)
    run(graphs, 4)
    assert (graphs._sampler.sampled[:4] >= 0).all()
