from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from krdistill.errors import ArgumentError, DataError
from krdistill.rng import generator
from krdistill.sampling import (
    SAMPLINGS,
    class_balanced_order,
    draw_shares,
    epoch_order,
    instance_order,
    progressively_balanced_order,
    square_root_order,
)

COUNTS = torch.tensor([400, 150, 60, 25, 9, 3, 1])


def _labels(counts: Tensor = COUNTS, seed: int = 0) -> Tensor:
    y = torch.repeat_interleave(counts)
    return y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))]


def _shares(sampling: str, t: float = 0.0) -> Tensor:
    pi = COUNTS.double() / COUNTS.sum()
    balanced = torch.full((7,), 1 / 7, dtype=torch.float64)
    return {
        "instance": pi,
        "class-balanced": balanced,
        "square-root": COUNTS.double().sqrt() / COUNTS.double().sqrt().sum(),
        "progressively-balanced": (1 - t) * pi + t * balanced,
    }[sampling]


def test_instance_order_is_the_loop_s_shuffle() -> None:
    for n, seed, epoch in ((1, 0, 0), (648, 3, 0), (648, 3, 7)):
        expected = torch.randperm(n, generator=generator(seed, "order", epoch))
        assert torch.equal(instance_order(n, seed, epoch), expected)
    y = _labels()
    assert torch.equal(epoch_order("instance", y, 3, 7), instance_order(len(y), 3, 7))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_shares_are_those_that_are_drawn(sampling: str, t: float) -> None:
    shares = draw_shares(sampling, COUNTS, progress=t)  # type: ignore[arg-type]
    assert shares.dtype == torch.float64 and torch.allclose(shares, _shares(sampling, t), rtol=1e-12, atol=0)
    y, drawn = _labels(), torch.zeros(7, dtype=torch.float64)
    for epoch in range(200):
        drawn += torch.bincount(y[epoch_order(sampling, y, 0, epoch, progress=t)], minlength=7)  # type: ignore[arg-type]
    assert torch.allclose(drawn / drawn.sum(), shares, atol=2e-4)


def test_shares_of_bad_input() -> None:
    with pytest.raises(ArgumentError, match="sampling"):
        draw_shares("balanced", COUNTS)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="progress"):
        draw_shares("progressively-balanced", COUNTS, progress=1.5)
    with pytest.raises(DataError, match="no training image"):
        draw_shares("square-root", [3, 0, 1])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_class_histogram_is_the_one_asked_for(sampling: str, t: float) -> None:
    y = _labels()
    order = epoch_order(sampling, y, 0, 0, progress=t)  # type: ignore[arg-type]
    assert order.shape == y.shape and order.dtype == torch.int64 and order.device.type == "cpu"
    counts = torch.bincount(y[order], minlength=7)
    expected = _shares(sampling, t) * len(y)
    assert bool(((counts - expected).abs() < 1).all()), (counts, expected)
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 0.99
    if sampling in ("class-balanced", "square-root"):  # and clearly not the plain shuffle's
        plain = _shares("instance") * len(y)
        assert stats.chisquare(counts.numpy(), plain.numpy()).pvalue < 1e-12


def test_rounding_is_right_on_average() -> None:
    """648 draws of 7 classes are 92.57 each: 92 or 93, and the mean over epochs is the share."""
    y = _labels()
    counts = torch.stack([torch.bincount(y[class_balanced_order(y, 0, e)], minlength=7) for e in range(400)])
    assert set(counts.unique().tolist()) == {92, 93}
    deviation = (counts.double().mean(0) - 648 / 7).abs()
    assert float(deviation.max()) < 5 * math.sqrt(0.25 / 400)


def test_rounding_of_unequal_shares_is_right_on_average() -> None:
    y = _labels(torch.tensor([7, 1]))
    head = [int((y[square_root_order(y, 0, epoch)] == 0).sum()) for epoch in range(400)]
    expected = 8 * math.sqrt(7) / (math.sqrt(7) + 1)  # 5.81
    assert set(head) == {5, 6}
    assert abs(sum(head) / 400 - expected) < 4 * math.sqrt((expected - 5) * (6 - expected) / 400)


def _by_loop(y: Tensor, order: Tensor) -> None:
    """A row of a class comes again only after all others of its class have come as often."""
    seen: dict[int, dict[int, int]] = {}
    members = torch.bincount(y).tolist()
    for row in order.tolist():
        of_class = seen.setdefault(int(y[row]), {})
        others = [of_class.get(r, 0) for r in of_class]
        if len(of_class) < members[int(y[row])]:
            assert of_class.get(row, 0) == 0
        else:
            assert of_class[row] == min(others)
        of_class[row] = of_class.get(row, 0) + 1


@pytest.mark.parametrize("order", [class_balanced_order, square_root_order])
def test_rows_repeat_only_when_their_class_is_used_up(order: Callable[[Tensor, int, int], Tensor]) -> None:
    y = _labels()
    for epoch in range(3):
        _by_loop(y, order(y, 0, epoch))
    rows = class_balanced_order(y, 0, 0)
    drawn = torch.bincount(rows, minlength=len(y))
    for k, n in enumerate(COUNTS.tolist()):
        of_class = drawn[y == k]
        assert int(of_class.max()) - int(of_class.min()) <= 1
        assert n <= 92 or int(of_class.max()) == 1


def test_every_repetition_is_in_a_fresh_order_and_head_rows_change_with_the_epoch() -> None:
    y = _labels(torch.tensor([90, 10]))
    order = class_balanced_order(y, 0, 0)
    tail = order[y[order] == 1]
    assert len(tail) == 50
    rounds = tail.reshape(5, 10)
    assert all(set(r.tolist()) == set(rounds[0].tolist()) for r in rounds)
    assert len({tuple(r.tolist()) for r in rounds}) == 5
    head = [set(class_balanced_order(y, 0, e)[y[class_balanced_order(y, 0, e)] == 0].tolist()) for e in range(12)]
    assert all(len(h) == 50 for h in head) and len(set.union(*head)) == 90


def test_every_row_of_a_class_is_drawn_equally_often_in_the_long_run() -> None:
    y = _labels(torch.tensor([40, 6, 2]))
    drawn = torch.zeros(48, dtype=torch.long)
    for epoch in range(500):
        drawn += torch.bincount(class_balanced_order(y, 0, epoch), minlength=48)
    assert drawn.sum() == 500 * 48
    for k, n in ((0, 40), (1, 6), (2, 2)):
        assert stats.chisquare(drawn[y == k].numpy()).pvalue > 1e-3
        assert int(drawn[y == k].sum()) == 500 * 16, n


def test_classes_are_spread_over_the_epoch() -> None:
    """With equal draws every K in a row are the K classes, in an order that changes."""
    y = _labels(torch.tensor([60, 25, 10, 5]))
    rounds = y[class_balanced_order(y, 0, 0)].reshape(25, 4)
    assert bool((rounds.sort(1).values == torch.arange(4)).all())
    assert len({tuple(r.tolist()) for r in rounds}) > 10


def test_progress() -> None:
    y = _labels()
    start = progressively_balanced_order(y, 0, 0, 0.0)
    assert torch.equal(start.sort().values, torch.arange(len(y)))
    head = [int((y[progressively_balanced_order(y, 0, 0, t)] == 0).sum()) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert head == sorted(head, reverse=True) and head[0] == 400 and head[-1] in (92, 93)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_pure_function_of_seed_and_epoch(sampling: str) -> None:
    y = _labels()

    def order(seed: int, epoch: int) -> Tensor:
        return epoch_order(sampling, y, seed, epoch, progress=0.5)  # type: ignore[arg-type]

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = order(0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(order(0, 0), first)
    assert not torch.equal(order(0, 1), first) and not torch.equal(order(1, 0), first)


def test_equal_counts_are_a_plain_shuffle_in_every_sampler() -> None:
    y = _labels(torch.tensor([20, 20, 20]))
    for sampling in SAMPLINGS:
        order = epoch_order(sampling, y, 0, 0, progress=0.7)  # type: ignore[arg-type]
        assert torch.equal(order.sort().values, torch.arange(60))


def test_order_of_rows_in_the_data_has_no_part_in_the_shares() -> None:
    y = _labels()
    for order in (class_balanced_order(y.sort().values, 0, 0), class_balanced_order(y.int(), 0, 0)):
        assert len(order) == len(y)
    assert torch.equal(class_balanced_order(y.int(), 0, 0), class_balanced_order(y, 0, 0))


def test_more_classes_than_draws_and_classes_without_rows() -> None:
    y = torch.tensor([7, 7, 2, 7, 7])  # classes 0, 1, 3 ... have no row and get no draw
    order = class_balanced_order(y, 0, 0)
    assert sorted((y[order] == 2).long().tolist()).count(1) in (2, 3)
    y = torch.cat([torch.arange(50), torch.zeros(14, dtype=torch.long)])
    counts = torch.bincount(y[class_balanced_order(y, 0, 0)], minlength=50)
    assert int(counts.min()) == 1 and int(counts.max()) == 2


def test_many_classes() -> None:
    """8,142 classes of 1 to 1,000 rows, as in iNaturalist 2018."""
    counts = (1000 * (1 / 1000) ** (torch.arange(8142) / 8141)).long().clamp(min=1)
    y = _labels(counts)
    drawn = torch.bincount(y[class_balanced_order(y, 0, 0)], minlength=8142)
    assert int(drawn.max()) - int(drawn.min()) <= 1


def test_bad_input() -> None:
    y = _labels()
    with pytest.raises(ArgumentError, match="sampling"):
        epoch_order("balanced", y, 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="labels"):
        class_balanced_order(y - 1, 0, 0)
    with pytest.raises(ArgumentError, match="labels"):
        square_root_order(y + 0.5, 0, 0)
    with pytest.raises(ArgumentError, match="labels"):
        class_balanced_order(y[:0], 0, 0)
    with pytest.raises(DataError, match="at least 2 classes"):
        class_balanced_order(y[y == 0], 0, 0)
    with pytest.raises(ArgumentError, match="progress"):
        progressively_balanced_order(y, 0, 0, 1.5)
    with pytest.raises(ArgumentError, match="epoch"):
        class_balanced_order(y, 0, -1)
    with pytest.raises(ArgumentError, match="seed"):
        instance_order(5, 0.5, 0)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="n:"):
        instance_order(0, 0, 0)
