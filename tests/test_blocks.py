"""Blocks one at a time compute what the whole Transformers model computes, in every family."""

from collections.abc import Callable
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny_models  # noqa: E402

from hasten.compress.blocks import Skeleton  # noqa: E402
from hasten.compress.statistics import collect  # noqa: E402
from hasten.errors import ModelError  # noqa: E402
from hasten.model import formats  # noqa: E402
from hasten.model.checkpoint import open_checkpoint  # noqa: E402


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_blocks_in_turn_give_the_models_hidden_states(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    tokens = torch.randint(3, tiny_models.VOCAB, (3, 60), generator=torch.Generator().manual_seed(1))
    model = tiny_models.make(family)
    with torch.no_grad():
        expected = model.base_model(tokens, output_hidden_states=True)
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint)
    inputs = skeleton.inputs(tokens)
    assert torch.equal(inputs.states, expected.hidden_states[0])
    original = dict(checkpoint.weights())
    for index in range(len(checkpoint.spec.layers)):
        block = skeleton.block(index)
        for name, weight in block.weights():
            assert (formats.dequantize(weight) == formats.dequantize(original.pop(name))).all(), name
        inputs.advance(block)
    final = skeleton.final_norm()(inputs.states)
    assert torch.allclose(final, expected.last_hidden_state, atol=2e-5)
    assert set(original) <= {"embed", "position_embed", "final_norm", "final_norm.bias", "head"}


def test_inputs_that_are_not_finite_are_an_error(tiny_model: Callable[..., Path]) -> None:
    skeleton = Skeleton(open_checkpoint(tiny_model("llama")))
    inputs = skeleton.inputs(torch.full((2, 8), 5))
    inputs.states[1, 3] = torch.inf
    with pytest.raises(ModelError, match=r"layers\.0\.q reads NaN or infinity on the calibration text"):
        collect(skeleton.block(0), inputs, ("q", "down"))
