"""Losses of distillation against their definitions, worked numbers and autograd."""

import math

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.nn.functional import cross_entropy, kl_div, log_softmax  # noqa: E402

from hasten.train.losses import divergence, divergence_reference, mixed_loss  # noqa: E402
from hasten.train.match import attention_loss, hidden_loss, like_depth, projection  # noqa: E402

KINDS = ("forward-kl", "reverse-kl", "jensen-shannon")


def logits_of(*probabilities: float) -> "torch.Tensor":
    return torch.tensor([probabilities], dtype=torch.float32).log()


def test_worked_numbers() -> None:
    teacher, student = logits_of(0.5, 0.5), logits_of(0.25, 0.75)
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert divergence(student, teacher, "forward-kl").item() == pytest.approx(forward, abs=1e-6)
    assert divergence(student, teacher, "reverse-kl").item() == pytest.approx(reverse, abs=1e-6)
    half = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)
    other = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    found = divergence(student, teacher, "jensen-shannon").item()
    assert found == pytest.approx(0.5 * half + 0.5 * other, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "beta"), [(1.0, 0.5), (2.5, 0.2)])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_values_and_gradients_are_those_of_the_definition(
    kind: str, temperature: float, beta: float, chunk: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(7, 19, generator=generator).mul(3).requires_grad_()
    teacher = torch.randn(7, 19, generator=generator) * 3
    fast = divergence(student, teacher, kind, temperature, beta, chunk)
    (own,) = torch.autograd.grad(fast * 2, student)
    slow = divergence_reference(student, teacher, kind, temperature, beta)
    (wanted,) = torch.autograd.grad(slow * 2, student)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 23, 50, 200, 1 << 20])
@pytest.mark.parametrize("weight", [None, 0.0, 0.3])
def test_text_and_teacher_in_one(chunk: int, weight: float | None) -> None:
    """Of logits [b, T, V], the positions that count and the tokens that the teacher knows."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(3, 6, 23, generator=generator).requires_grad_()
    teacher = torch.randn(3, 4, 19, generator=generator)
    targets = None if weight is None else torch.randint(23, (3, 4), generator=generator)
    fast = mixed_loss(student, teacher, targets, "reverse-kl", 2.0, weight=weight or 0.0, start=1, chunk=chunk)
    counted = student[:, 1:5]
    slow = divergence_reference(counted[..., :19].flatten(0, 1), teacher.flatten(0, 1), "reverse-kl", 2.0)
    if targets is not None:
        slow = weight * slow + (1 - weight) * cross_entropy(counted.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(fast, slow)
    (own,), (wanted,) = (torch.autograd.grad(loss * 3, student) for loss in (fast, slow))
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_both_rule_out_are_no_nan(kind: str) -> None:
    student = torch.tensor([[1.0, 0.0, -500.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -400.0]])
    for divide in (divergence, divergence_reference):
        value = divide(student, teacher, kind)
        (slope,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert slope.isfinite().all()


def test_forward_kl_is_torchs_own() -> None:
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    own = kl_div(log_softmax(student, -1), log_softmax(teacher, -1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(divergence(student, teacher, "forward-kl"), own)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_distribution_costs_nothing(kind: str) -> None:
    logits = torch.randn(4, 9, requires_grad=True)
    loss = divergence(logits, logits.detach() + 3.0, kind, temperature=2.0)  # a constant changes no distribution
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.abs().item() < 1e-6
    assert gradient.abs().max().item() < 1e-6


def test_jensen_shannon_lies_between_the_two() -> None:
    """GKD, section 3: over beta it tends to forward KL, over 1 - beta to reverse KL."""
    student, teacher = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
    small = 1e-3
    near_forward = divergence(student, teacher, "jensen-shannon", beta=small) / small
    near_reverse = divergence(student, teacher, "jensen-shannon", beta=1 - small) / small
    assert near_forward.item() == pytest.approx(divergence(student, teacher, "forward-kl").item(), rel=0.02)
    assert near_reverse.item() == pytest.approx(divergence(student, teacher, "reverse-kl").item(), rel=0.02)


def test_layers_are_mapped_evenly_and_the_last_to_the_last() -> None:
    assert like_depth(3, 6) == ((0, 1), (1, 3), (2, 5))
    assert like_depth(2, 5) == ((0, 1), (1, 4))
    assert like_depth(3, 3) == ((0, 0), (1, 1), (2, 2))
    assert like_depth(4, 2) == ((0, 0), (1, 0), (2, 0), (3, 1))


def test_matching_costs_nothing_where_there_is_nothing_to_learn() -> None:
    states = [torch.randn(2, 3, 8) for _ in range(3)]
    assert hidden_loss(states, states, ((0, 0), (1, 1)), projection(8, 8)).item() == 0
    weights = [torch.randn(2, 4, 3, 3).softmax(-1) for _ in range(2)]
    assert attention_loss(weights, weights, ((0, 0), (1, 1))).item() == pytest.approx(0, abs=1e-6)


def test_matching_of_other_widths_and_heads() -> None:
    teacher = [torch.randn(1, 3, 8) for _ in range(3)]
    student = [torch.zeros(1, 3, 4) for _ in range(3)]
    assert hidden_loss(student, teacher, ((0, 0), (1, 1)), projection(4, 8)).item() == pytest.approx(
        1
    )  # all of it is missing
    many, few = torch.randn(1, 4, 3, 3).softmax(-1), torch.randn(1, 2, 3, 3).softmax(-1)
    wanted = (many.mean(1) * (many.mean(1).log() - few.mean(1).log())).sum(-1).mean()
    torch.testing.assert_close(attention_loss([few], [many], ((0, 0),)), wanted)
