"""Coresets against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krdistill.condense import herd, random_rows
from krdistill.errors import ArgumentError, DataError

LABELS = torch.tensor([0] * 9 + [1] * 3 + [2] * 6)[torch.randperm(18, generator=torch.Generator().manual_seed(0))]


def features(seed: int = 1) -> torch.Tensor:
    return torch.randn(18, 5, generator=torch.Generator().manual_seed(seed))


def brute_force(x: np.ndarray, ipc: int) -> list[int]:
    """Algorithm 4 of iCaRL, word by word, on the rows of one class."""
    x = x / np.sqrt((x**2).sum(1, keepdims=True))
    chosen: list[int] = []
    for m in range(1, ipc + 1):
        distances = {}
        for i in range(len(x)):
            if i not in chosen:
                exemplars = np.mean([x[j] for j in [*chosen, i]], axis=0)
                assert len([*chosen, i]) == m
                distances[i] = float(np.sqrt(((x.mean(0) - exemplars) ** 2).sum()))
        chosen.append(min(distances, key=lambda i: distances[i]))
    return chosen


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_herding_is_the_greedy_choice(seed: int) -> None:
    x = features(seed)
    rows = herd(x, LABELS, 3, 3).reshape(3, 3)
    for k in range(3):
        own = LABELS.eq(k).nonzero().squeeze(1)
        assert rows[k].tolist() == own[brute_force(x[own].double().numpy(), 3)].tolist()


def test_herding_nears_the_mean_better_than_lots() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(4)) + 0.5
    y = torch.zeros(400, dtype=torch.int64)
    unit = torch.nn.functional.normalize(x.double(), dim=1)

    def far(rows: torch.Tensor) -> float:
        return float((unit[rows].mean(0) - unit.mean(0)).norm())

    herded = far(herd(x, y, 1, 20))
    assert all(herded < far(random_rows(y, 1, 20, seed=s)) / 3 for s in range(10))


def test_more_per_class_keep_the_first() -> None:
    for few, many in (
        (herd(features(), LABELS, 3, 2), herd(features(), LABELS, 3, 5)),
        (random_rows(LABELS, 3, 2), random_rows(LABELS, 3, 5)),
    ):
        assert torch.equal(few.reshape(3, 2), many.reshape(3, 5)[:, :2])


def test_small_classes_give_all_they_have_in_turn() -> None:
    for rows in (herd(features(), LABELS, 3, 7), random_rows(LABELS, 3, 7)):
        assert LABELS[rows].tolist() == [0] * 7 + [1] * 7 + [2] * 7
        _, one, two = rows.reshape(3, 7).tolist()
        assert sorted(one[:3]) == LABELS.eq(1).nonzero().squeeze(1).tolist() and one[3:6] == one[:3]
        assert len(set(two)) == 6 and two[6] == two[0]
        assert len(set(rows[:7].tolist())) == 7


def test_lots_are_of_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert torch.equal(random_rows(LABELS, 3, 3, seed=5), random_rows(LABELS, 3, 3, seed=5))
    assert not torch.equal(random_rows(LABELS, 3, 3, seed=5), random_rows(LABELS, 3, 3, seed=6))
    assert torch.equal(before, torch.get_rng_state())


def test_what_cannot_be_chosen_is_refused() -> None:
    with pytest.raises(ArgumentError, match="ipc: expected a whole number >= 1"):
        random_rows(LABELS, 3, 0)
    with pytest.raises(DataError, match="largest class has 9 images"):
        herd(features(), LABELS, 3, 10)
    with pytest.raises(DataError, match="no row of class 3"):
        random_rows(LABELS, 4, 1)
    with pytest.raises(ArgumentError, match="features"):
        herd(features()[:, 0], LABELS, 3, 1)
    broken = features()
    broken[3, 0] = torch.nan
    with pytest.raises(ArgumentError, match="row 3 holds NaN"):
        herd(broken, LABELS, 3, 1)
