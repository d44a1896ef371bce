"""SamplingParams takes numbers of every kind and refuses everything else in one line that names the parameter."""

from dataclasses import fields

import numpy as np
import pytest
from engine_tools import make_engine

from hasten import SamplingParams
from hasten.errors import RequestError

OPTIONAL = {
    "max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "logprobs", "prompt_logprobs"
}  # fmt: skip


@pytest.mark.parametrize("name", [item.name for item in fields(SamplingParams)])
def test_none_is_taken_only_where_it_means_not_given(name: str) -> None:
    if name in OPTIONAL:
        assert getattr(SamplingParams(**{name: None}), name) is None
    else:
        with pytest.raises(RequestError, match=f"{name} is None"):
            SamplingParams(**{name: None})


@pytest.mark.parametrize("name", [item.name for item in fields(SamplingParams)])
@pytest.mark.parametrize(
    "value",
    ["1", b"1", 1j, {"a"}, object(), [[1]], {"a": 1}, float("nan"), 10**400],
    ids=lambda value: type(value).__name__,
)
def test_a_value_of_another_type_is_named(name: str, value: object) -> None:
    if name == "stop" and value == "1":
        return  # that is a stop string
    if name in ("max_tokens", "min_tokens", "top_k") and value == 10**400:
        return  # a whole number, if a large one
    with pytest.raises(RequestError, match=name) as found:
        SamplingParams(**{name: value})
    assert len(str(found.value)) < 200


def test_numbers_of_numpy_are_numbers() -> None:
    found = SamplingParams(
        n=np.int64(2),
        max_tokens=np.int32(5),
        temperature=np.float32(0.5),
        top_p=np.float64(0.25),
        seed=np.uint64((1 << 64) - 1),
        presence_penalty=1,
        stop_token_ids=np.array([3, 4]),
        logit_bias={np.int64(7): np.float32(2)},
    )
    expected = SamplingParams(
        n=2,
        max_tokens=5,
        temperature=0.5,
        top_p=0.25,
        seed=(1 << 64) - 1,
        presence_penalty=1.0,
        stop_token_ids=(3, 4),
        logit_bias={7: 2.0},
    )
    assert found == expected
    assert {type(value) for value in (found.n, found.seed, *found.stop_token_ids, *found.logit_bias)} == {int}
    assert {type(value) for value in (found.temperature, found.presence_penalty, found.logit_bias[7])} == {float}


@pytest.mark.parametrize("name", ["n", "top_k", "top_p", "temperature", "priority"])
def test_a_truth_value_is_no_number(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is True"):
        SamplingParams(**{name: True})


def test_a_request_that_cannot_be_built_leaves_nothing_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    made = []

    def breaks_at_the_third(sequence: object) -> None:
        made.append(sequence)
        if len(made) == 3:
            raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("hasten.engine.engine.prepare", breaks_at_the_third)
        with pytest.raises(MemoryError):
            engine.add([1, 2], SamplingParams(n=4))
    assert engine.num_unfinished == 0
    assert engine.scheduler.num_waiting == 0
    assert engine.step() == []
