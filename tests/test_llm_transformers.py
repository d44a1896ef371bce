"""Greedy tokens and scores equal Transformers' in float32, for every family: ragged batches, prompts longer than a
prefill chunk, sliding windows crossed, blocks shared; through LLM as a user calls it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import FAMILIES

from hasten import LLM, SamplingParams

NEW = 24
LENGTHS = (1, 5, 23, 60, 97)  # windows are 16 to 30, chunks 40


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("torch")
    return pytest.importorskip("transformers")


def prompts(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Ragged, and two of them share a prefix longer than a block."""
    random = np.random.default_rng(3)
    made = [random.integers(3, vocab_size, length).tolist() for length in lengths]
    return [*made, [*made[-1][:-3], 7, 8]]


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    import torch

    with torch.no_grad():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return ids[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def compare(folder: Path, transformers: Any, backend: str, asked: list[list[int]], **arguments: Any) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    with LLM(str(folder), device=backend, max_step_tokens=40, max_sequences=40, **arguments) as llm:  # type: ignore[arg-type]
        outputs = llm.generate(asked, SamplingParams(max_tokens=NEW))
    for prompt, output in zip(asked, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == greedy(model, prompt, NEW), f"prompt of {len(prompt)} tokens"
    assert outputs[-1].metrics.num_cached_tokens > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_native_backend(family: str, tiny_model: Callable[..., Path], transformers: Any) -> None:
    long = {"max_len": 256} if family == "phi3_longrope" else {}
    lengths = (49, 60, 97) if long else LENGTHS  # Transformers too takes the long factors for these
    compare(tiny_model(family), transformers, "cpu", prompts(307, lengths), **long)


def test_native_backend_below_the_original_length_of_longrope(
    tiny_model: Callable[..., Path], transformers: Any
) -> None:
    compare(tiny_model("phi3_longrope"), transformers, "cpu", prompts(307, (1, 5, 24)), block_size=16)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_reference_backend(family: str, tiny_model: Callable[..., Path], transformers: Any) -> None:
    compare(tiny_model(family), transformers, "reference", prompts(307, (3, 50, 60)))


@pytest.mark.parametrize("speculation", ["none", "ngram"])
def test_trained_weights(shared_data: Path, transformers: Any, speculation: str) -> None:
    folder = shared_data / "stories260K"
    compare(folder, transformers, "cpu", prompts(512), speculation=speculation)
    with LLM(str(folder), speculation=speculation) as llm:  # type: ignore[arg-type]
        text = llm.generate("Once upon a time", SamplingParams(max_tokens=30))[0].text
    assert text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_scores_equal_log_softmax(family: str, tiny_model: Callable[..., Path], transformers: Any) -> None:
    import torch

    folder = tiny_model(family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    asked = prompts(307)
    with LLM(str(folder), max_step_tokens=40, max_sequences=40) as llm:
        scores = llm.score(asked)
        again = llm.score(asked[3])[0]
    for prompt, score in zip(asked, scores, strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        expected = logprobs[torch.arange(len(prompt) - 1), torch.tensor(prompt[1:], dtype=torch.long)].numpy()
        assert score.token_ids == tuple(prompt)
        assert score.logprobs.shape == (len(prompt) - 1,)
        np.testing.assert_allclose(score.logprobs, expected, atol=2e-4)
    np.testing.assert_array_equal(again.logprobs, scores[3].logprobs)
