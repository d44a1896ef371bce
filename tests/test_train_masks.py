"""Schedules at their end points, masks, and what holds zeros while a model trains."""

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from hasten.errors import RecipeError  # noqa: E402
from hasten.steps import Finetune, Gradual  # noqa: E402
from hasten.train.masks import PRUNED, Masks, is_due, is_pruned, mask_of, sparsity_at  # noqa: E402


def zeros(weight: "torch.Tensor") -> int:
    return int((weight == 0).sum())


def test_the_schedule_is_exact_at_its_ends_and_cubic_between() -> None:
    schedule = Gradual(final_sparsity=0.8, begin_step=10, end_step=110, initial_sparsity=0.2, every=7)
    assert sparsity_at(schedule, 9) == 0
    assert sparsity_at(schedule, 10) == pytest.approx(0.2, abs=1e-15)
    assert sparsity_at(schedule, 60) == pytest.approx(0.8 - 0.6 * 0.5**3)
    assert sparsity_at(schedule, 110) == 0.8
    assert sparsity_at(schedule, 5000) == 0.8
    rising = [sparsity_at(schedule, step) for step in range(10, 111)]
    assert rising == sorted(rising)
    due = [step for step in range(200) if is_due(schedule, step)]
    assert (due[0], due[1], due[-2], due[-1]) == (10, 17, 108, 110)


def test_masks_take_the_smallest_and_exactly_as_many_as_asked() -> None:
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    keep = mask_of(weight, 0.25, "unstructured")
    assert int((~keep).sum()) == 24
    assert weight[~keep].abs().max() < weight[keep].abs().min()
    ties = mask_of(torch.ones(4, 4), 0.5, "unstructured")
    assert int(ties.sum()) == 8


def test_docs_say_from_how_many_zeros_on_they_are_held() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
    assert f"more than {PRUNED:.0%} of its numbers, though not all, are exactly zero".replace("%", " %") in page
    weight = torch.ones(10, 10)
    weight[0, 0] = 0
    assert not is_pruned(weight != 0)
    weight[0, 1] = 0
    assert is_pruned(weight != 0)


def test_two_of_four_goes_group_by_group() -> None:
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.1, 0.2, -0.3, 0.4]])
    assert mask_of(weight, 0.5, "2:4").tolist() == [[False, True, False, True, False, False, True, True]]
    assert mask_of(weight, 0.25, "2:4").tolist() == [[True, True, True, True, False, False, True, True]]
    assert mask_of(weight, 0.0, "2:4").all()


def test_zeros_stay_while_weights_move_and_the_end_is_exact() -> None:
    schedule = Gradual(final_sparsity=0.75, begin_step=2, end_step=6, every=2, targets=("layers.*.down",))
    weights = {"layers.0.down": torch.randn(16, 16), "layers.0.up": torch.randn(16, 16)}
    masks = Masks(weights, schedule)
    found = []
    before: torch.Tensor | None = None
    for step in range(9):
        for weight in weights.values():
            weight.add_(torch.randn(16, 16) * 0.1)
        masks(step)
        down = weights["layers.0.down"]
        if before is not None:
            assert not down[before].any()  # once zero, always zero
        before = down == 0
        found.append(zeros(down))
    assert found == [0, 0, 0, 0, 168, 168, 192, 192, 192]
    assert zeros(weights["layers.0.up"]) == 0


def test_zeros_take_no_gradient() -> None:
    weights = {f"layers.0.{role}": torch.nn.Parameter(torch.randn(8, 8)) for role in ("down", "up")}
    masks = Masks(weights, Gradual(final_sparsity=0.5, begin_step=1, end_step=2, every=1, targets=("layers.*.down",)))
    for step, share in ((0, 0.0), (1, 0.0), (2, 0.5)):
        masks(step)
        for weight in weights.values():
            weight.grad = None
            (weight * torch.ones(8, 8)).sum().backward()
        down, up = (weight.grad for weight in weights.values())
        assert (down == 0).float().mean() == share
        assert (up == 1).all()


def test_what_was_pruned_before_stays_pruned() -> None:
    pruned, dense, empty = torch.randn(8, 8), torch.randn(8, 8), torch.zeros(8, 8)
    pruned[mask_of(pruned, 0.5, "unstructured").logical_not()] = 0
    masks = Masks({"layers.0.q": pruned, "layers.0.k": dense, "layers.0.o": empty})
    masks(0)
    for weight in (pruned, dense, empty):
        weight.add_(1.0)
    masks(1)
    assert (zeros(pruned), zeros(dense), zeros(empty)) == (32, 0, 0)


def test_errors() -> None:
    with pytest.raises(RecipeError, match="has 6 inputs, 2:4 needs a multiple of 4"):
        Masks({"layers.0.q": torch.ones(4, 6)}, Gradual(0.5, 0, 4, pattern="2:4"))
    with pytest.raises(RecipeError, match=r"final_sparsity is 0\.6, pattern 2:4 ends at 0.5"):
        Gradual(0.6, 0, 4, pattern="2:4")
    with pytest.raises(RecipeError, match="end_step is 20, expected at most steps, which is 10"):
        Finetune(steps=10, sparsity=Gradual(0.5, 0, 20))
