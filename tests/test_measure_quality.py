"""Quality on windows of text: equal to float64 by hand, however the logits come in chunks."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hasten.backends.reference import ReferenceBackend
from hasten.compress import rtn
from hasten.errors import HastenError, ModelError
from hasten.measure import quality
from hasten.measure.quality import compare_rows, score, summarize
from hasten.measure.text import Window, make_windows, split
from hasten.model.checkpoint import open_checkpoint
from hasten.model.formats import Format, Weight

TEXT = "It was the best of times, it was the worst of times.\nIt was the age of wisdom, ünd der Törheit 北京.\n" * 30


def by_byte(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def reference(p: np.ndarray, q: np.ndarray, targets: np.ndarray) -> np.ndarray:
    p, q = p.astype(np.float64), q.astype(np.float64)
    log_p = p - np.log(np.exp(p).sum(axis=1, keepdims=True))
    log_q = q - np.log(np.exp(q).sum(axis=1, keepdims=True))
    nll = -log_q[np.arange(len(q)), targets]
    before, after = p.argmax(1), q.argmax(1)
    flips = [(before == targets) & (after != targets), (before != targets) & (after == targets)]
    return np.stack([nll, (np.exp(log_p) * (log_p - log_q)).sum(axis=1), before == after, *flips])


@pytest.mark.parametrize("vocab", [7, 300, 70_000])
def test_rows_match_float64(vocab: int) -> None:
    random = np.random.default_rng(vocab)
    p = (3 * random.standard_normal((9, vocab))).astype(np.float32)
    q = (p + 0.1 * random.standard_normal(p.shape) + 5).astype(np.float32)
    targets = random.integers(0, vocab, 9).astype(np.int32)
    targets[:3], targets[3:6] = p.argmax(1)[:3], q.argmax(1)[3:6]
    np.testing.assert_allclose(compare_rows(p, q, targets), reference(p, q, targets), rtol=1e-4, atol=1e-6)
    same = compare_rows(p, p, targets)
    assert (same[1] == 0).all()
    assert (same[2] == 1).all()
    assert (same[3:] == 0).all()


def test_windows_hold_the_text_within_their_length() -> None:
    windows = make_windows(TEXT, by_byte, 1, 100)
    assert all(len(window.tokens) <= 100 and window.tokens[0] == 1 for window in windows)
    assert all(window.num_bytes == len(window.tokens) - 1 for window in windows)
    joined = bytes(int(token) - 3 for window in windows for token in window.tokens[1:])
    assert TEXT.encode().startswith(joined)
    assert len(joined) > len(TEXT.encode()) - 100
    search, final = split(windows)
    assert len(search) + len(final) == len(windows)
    assert {id(window) for window in search}.isdisjoint(id(window) for window in final)


def test_without_bos_the_first_token_is_given_and_not_counted() -> None:
    windows = make_windows(TEXT, by_byte, None, 100)
    assert all(window.num_bytes == len(window.tokens) - 1 for window in windows)


def test_few_windows_are_spread_and_too_little_text_is_refused() -> None:
    every = make_windows(TEXT, by_byte, 1, 100)
    some = make_windows(TEXT, by_byte, 1, 100, most=5)
    assert len(some) == 5
    assert some[0].tokens.tolist() == every[0].tokens.tolist()
    with pytest.raises(HastenError, match=r"the text gives [23] windows"):
        make_windows(TEXT[:150], by_byte, 1, 100)


@pytest.fixture(scope="module")
def tiny(tiny_model: Callable[..., Path]) -> Any:
    return open_checkpoint(tiny_model("llama"))


def loaded(checkpoint: Any, fmt: Format | None = None) -> ReferenceBackend:
    def weights() -> Any:
        for name, weight in checkpoint.weights():
            chosen = fmt is not None and weight.shape[1] > 1
            yield name, (rtn.quantize(name, weight, fmt) if chosen else weight)  # type: ignore[arg-type]

    backend = ReferenceBackend()
    backend.load(checkpoint.spec, weights())
    return backend


def tiny_windows() -> tuple[Window, ...]:
    return make_windows(TEXT[:300], by_byte, 1, 50)


def test_scores_do_not_depend_on_chunks(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, found = tiny_windows(), []
    for size in (64 << 20, 4 * tiny.spec.vocab_size * 7):
        monkeypatch.setattr(quality, "_LOGITS_BYTES", size)
        models = {"original": (loaded(tiny), "fp32"), "int4": (loaded(tiny, Format("int4")), "fp32")}
        found.append(score(models, windows, tiny.spec.vocab_size, threads=2))
    for name in ("original", "int4"):
        np.testing.assert_allclose(found[0][name].nll, found[1][name].nll, rtol=1e-6)
        np.testing.assert_allclose(found[0][name].divergence, found[1][name].divergence, rtol=1e-3, atol=1e-7)
    assert (found[0]["original"].divergence == 0).all()
    summary = summarize(found[0]["int4"], found[0]["original"])
    assert summary.loss is not None
    assert summary.divergence is not None
    assert summary.top1_agreement is not None
    assert summary.divergence.low < summary.divergence.median < summary.divergence.high
    assert summary.divergence.median > 1e-6
    bits = found[0]["int4"].nll.sum() / found[0]["int4"].num_bytes.sum() / math.log(2)
    assert summary.bits_per_byte.median == pytest.approx(bits)
    base = summarize(found[0]["original"])
    ratio = summary.bits_per_byte.median / base.bits_per_byte.median - 1
    assert summary.loss.median == pytest.approx(ratio, abs=1e-9)


def test_models_may_share_a_backend(tiny: Any) -> None:
    """Two ways of storing keys and values over one set of weights score as they do on backends of their own."""
    windows = tiny_windows()
    one = loaded(tiny)
    alone = score({"fp32": (loaded(tiny), "fp32"), "int8": (loaded(tiny), "int8")}, windows, tiny.spec.vocab_size)
    shared = score({"fp32": (one, "fp32"), "int8": (one, "int8")}, windows, tiny.spec.vocab_size)
    for name in alone:
        np.testing.assert_allclose(shared[name].nll, alone[name].nll, rtol=1e-12)
        np.testing.assert_allclose(shared[name].divergence, alone[name].divergence, rtol=1e-12)
    assert shared["int8"].divergence.sum() > 0


def test_an_uninformed_model_costs_log_vocab(tiny: Any) -> None:
    """Zero embeddings give equal logits: perplexity is the size of the vocabulary."""

    def weights() -> Any:
        for name, weight in tiny.weights():
            if name == "head":
                weight = Weight(weight.format, weight.shape, np.zeros_like(weight.data))
            yield name, weight

    backend = ReferenceBackend()
    backend.load(tiny.spec, weights())
    windows = tiny_windows()
    found = summarize(score({"m": (backend, "fp32")}, windows, tiny.spec.vocab_size)["m"])
    assert found.perplexity.median == pytest.approx(tiny.spec.vocab_size, rel=1e-5)
    assert found.loss is None


def test_logits_that_are_not_numbers_are_refused(tiny: Any) -> None:
    class Broken(ReferenceBackend):
        def forward(self, batch: Any) -> Any:
            return super().forward(batch) * np.float32(np.nan)

    backend = Broken()
    backend.load(tiny.spec, tiny.weights())
    with pytest.raises(ModelError, match="broken gives logits that are not numbers"):
        score({"broken": (backend, "fp32")}, tiny_windows(), tiny.spec.vocab_size)


def test_no_interval_reaches_below_nothing() -> None:
    ones = np.ones(8)
    uneven = np.array([0.0, 0, 0, 0, 0, 0, 0, 8])
    found = quality.summarize(
        quality.Scores(uneven, uneven, ones, 0 * ones, 0 * ones, ones, ones),
        quality.Scores(ones, 0 * ones, ones, 0 * ones, 0 * ones, ones, ones),
    )
    assert found.loss is not None
    assert found.divergence is not None
    assert found.loss.low < 0  # which may be
    assert found.bits_per_byte.low == found.divergence.low == 0
    assert found.perplexity.low == 1
