"""Sampling on the GPU at the size of real vocabularies, against the numpy sampler."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from sampling_tools import check_draws, check_sampling  # noqa: E402


@pytest.mark.parametrize("vocab", [211, 32_000, 151_936])
@pytest.mark.parametrize("least_k", [0, 1])
def test_sampling_equals_the_reference(vocab: int, least_k: int) -> None:
    check_sampling("cuda", 24, vocab, least_k)


@pytest.mark.parametrize("vocab", [5, 16, 1500, 151_936])
@pytest.mark.parametrize("rows", [5, 40])
def test_draws_are_those_of_the_reference(vocab: int, rows: int) -> None:
    check_draws("cuda", vocab, rows)
