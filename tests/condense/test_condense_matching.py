"""Distribution matching: views by hand, gradients against finite differences, images that move and stay in range."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from krdistill.condense.matching import (
    ConvNet,
    augment,
    channel_statistics,
    draw_views,
    match_distributions,
    matching_gradient,
    mean_distance,
    start_images,
)
from krdistill.data import ImageData, load_images
from krdistill.errors import ArgumentError, DataError
from krdistill.rng import forked, generator

SMALL: dict[str, Any] = {"real_batch": 6, "width": 8, "flip": False}


@pytest.fixture(scope="module")
def digits() -> ImageData:
    """Three digits: twelve zeros, seven ones, one two."""
    train = load_images("digits").train
    assert isinstance(train, ImageData)
    rows = [(train.labels == k).nonzero().squeeze(1)[:n] for k, n in enumerate((12, 7, 1))]
    return train.subset(torch.cat(rows))


def prepared(data: ImageData) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    mean, std = channel_statistics(data.images)

    def normalised(rows: Tensor) -> Tensor:
        return ((data.images[rows].float() / 255 - mean) / std).permute(0, 3, 1, 2)

    return normalised, [(data.labels == k).nonzero().squeeze(1) for k in range(3)]


def plain(number: int) -> dict[str, Tensor]:
    return {
        "matrix": torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(number, 1, 1),
        "brightness": torch.zeros(number),
        "saturation": torch.ones(number),
        "contrast": torch.ones(number),
        "hole": torch.full((number, 2), torch.nan),
    }


def test_distance_by_hand() -> None:
    real = torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    synthetic = torch.tensor([[[0.0, 0.0], [4.0, 2.0]], [[2.0, 2.0], [2.0, 0.0]]])
    assert float(mean_distance(real, synthetic)) == pytest.approx((1 + 1) + (0 + 1))


def test_views_by_hand() -> None:
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 1, 1])
    assert torch.allclose(augment(x, plain(2), index), x, atol=1e-6)
    views = plain(2)
    views["matrix"][1, 0, 0] = -1
    views["brightness"][0] = 0.5
    seen = augment(x, views, index)
    assert torch.allclose(seen[0], x[0] + 0.5, atol=1e-6)
    assert torch.allclose(seen[1:], x[1:].flip(3), atol=1e-5)
    views = plain(1)
    views["matrix"][0, 1, 2] = 2 / 8  # the row below comes up
    seen = augment(x[:1], views, torch.tensor([0]))
    assert torch.allclose(seen[0, :, :-1], x[0, :, 1:], atol=1e-5) and not bool(seen[0, :, -1].any())
    views = plain(1)
    views["hole"][0] = torch.tensor([0.0, 0.5])  # rows 0 and 1 of 8, columns 2 to 5
    expected = x[:1].clone()
    expected[:, :, :2, 2:6] = 0
    assert torch.allclose(augment(x[:1], views, torch.tensor([0])), expected, atol=1e-6)
    views = plain(1)
    views["saturation"][0], views["contrast"][0] = 0.0, 2.0
    grey = x[:1].mean(1, keepdim=True).expand_as(x[:1])
    assert torch.allclose(augment(x[:1], views, torch.tensor([0])), 2 * grey - grey.mean(), atol=1e-5)


def test_draws_are_within_their_strengths() -> None:
    views = draw_views(4000, flip=True, gen=generator(0, "test"))
    matrix, hole = views["matrix"], views["hole"]
    assert float(matrix[:, :, 2].abs().max()) <= 0.25
    assert float(matrix[:, 0, 0].max()) <= 1.2 and 0 < int((matrix[:, 0, 0] < 0).sum()) < 4000 / 6
    assert not bool((draw_views(4000, flip=False, gen=generator(0, "test"))["matrix"][:, 0, 0] < 0).any())
    assert float(views["brightness"].abs().max()) <= 0.5 and float(views["contrast"].min()) >= 0.5
    assert 1 / 8 < float((~hole.isnan()).all(1).double().mean()) < 1 / 5
    changed = torch.stack([(matrix != plain(4000)["matrix"]).flatten(1).any(1), ~hole.isnan().any(1),
                           views["contrast"] != 1])  # fmt: skip
    assert int(changed.sum(0).max()) == 1  # one at a time


def test_gradient_of_a_step(digits: ImageData) -> None:
    """The loss against a loop over classes, its gradient against the loss a little further along it."""
    normalised, members = prepared(digits)
    pixels = start_images(normalised, members, 2)
    for step in range(3):
        loss, slope = matching_gradient(pixels, normalised, members, step, seed=7, **SMALL)
        with forked(7, "condense", "network", step):
            network = ConvNet(1, 8, 8)
        gen = generator(7, "condense", "step", step)
        views = draw_views(3, flip=False, gen=gen)
        rows = [r[torch.randperm(len(r), generator=gen)[:6]] for r in members]
        expected = 0.0
        with torch.no_grad():
            for k in range(3):
                one = torch.full((6,), k)
                real = network(augment(normalised(rows[k]), views, one[: len(rows[k])])).mean(0)
                own = network(augment(pixels[k], views, one[:2])).mean(0)
                expected += float(((real - own) ** 2).sum())
        assert loss == pytest.approx(expected, rel=1e-4)
        along = slope / slope.norm()
        ahead, behind = (
            matching_gradient(pixels + e * along, normalised, members, step, seed=7, **SMALL)[0] for e in (2e-3, -2e-3)
        )
        assert (ahead - behind) / 4e-3 == pytest.approx(float(slope.norm()), rel=0.05)


def test_parts_change_nothing(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    normalised, members = prepared(digits)
    pixels = start_images(normalised, members, 2)
    whole = matching_gradient(pixels, normalised, members, 0, seed=0, **SMALL)
    monkeypatch.setattr("krdistill.condense.matching._ROWS", 1)
    parts = matching_gradient(pixels, normalised, members, 0, seed=0, **SMALL)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    assert torch.allclose(parts[1], whole[1], rtol=1e-3, atol=1e-5)


def test_images_move_stay_in_range_and_match_better(digits: ImageData) -> None:
    normalised, members = prepared(digits)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found, losses = match_distributions(digits.images, digits.labels, 3, 2, iterations=40, **SMALL)
    again, _ = match_distributions(digits.images, digits.labels, 3, 2, iterations=40, **SMALL)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(found, again) and len(losses) == 40
    assert found.dtype == torch.uint8 and found.shape == (6, 8, 8, 1)
    start = start_images(normalised, members, 2)
    mean, std = channel_statistics(digits.images)
    end = ((found.float() / 255 - mean) / std).permute(0, 3, 1, 2).unflatten(0, (3, 2))
    assert float((end - start).abs().mean()) > 0.1
    unseen: dict[str, Any] = {"real_batch": 99, "width": 8, "flip": False, "seed": 123}
    scores = [sum(matching_gradient(x, normalised, members, s, **unseen)[0] for s in range(12)) for x in (start, end)]
    assert scores[1] < 0.8 * scores[0]


def test_a_class_of_one_image_becomes_different_ones(digits: ImageData) -> None:
    normalised, members = prepared(digits)
    start = start_images(normalised, members, 3)
    assert torch.equal(start[2, 0], normalised(members[2])[0])
    assert 0 < float((start[2, 1] - start[2, 2]).abs().max()) < 1
    assert len({tuple(x.flatten().tolist()) for x in start[0]}) == 3


def test_a_stopped_matching_goes_on_to_the_same_images(digits: ImageData) -> None:
    kept: list[dict[str, Any]] = []

    def on_step(done: int, total: int, snapshot: Callable[[], dict[str, Any]]) -> None:
        assert total == 6
        if done == 3:
            kept.append(snapshot())

    whole, known = match_distributions(digits.images, digits.labels, 3, 2, iterations=6, on_step=on_step, **SMALL)
    rest, losses = match_distributions(digits.images, digits.labels, 3, 2, iterations=6, state=kept[0], **SMALL)
    assert torch.equal(rest, whole) and losses == known and len(losses) == 6 and len(kept[0]["losses"]) == 3


def test_the_network_is_as_deep_as_the_images_allow() -> None:
    for side, blocks, width in ((8, 2, 2 * 2), (16, 2, 4 * 4), (32, 3, 4 * 4), (64, 4, 4 * 4)):
        network = ConvNet(3, side, 4)
        assert len(network.blocks) == 4 * blocks
        assert network(torch.zeros(2, 3, side, side)).shape == (2, 4 * width)


def test_what_cannot_be_matched_is_refused(digits: ImageData) -> None:
    with pytest.raises(ArgumentError, match="ipc"):
        match_distributions(digits.images, digits.labels, 3, 0)
    with pytest.raises(ArgumentError, match="uint8"):
        match_distributions(digits.images.float(), digits.labels, 3, 1)
    with pytest.raises(DataError, match="No image of class 3"):
        match_distributions(digits.images, digits.labels, 4, 1)
    with pytest.raises(DataError, match="4 pixels a side, got 3"):
        match_distributions(digits.images[:, :3], digits.labels, 3, 1)
    with pytest.raises(ArgumentError, match="lr"):
        match_distributions(digits.images, digits.labels, 3, 1, lr=0.0)
    with pytest.raises(ArgumentError, match="state"):
        state = {"pixels": torch.zeros(1), "velocity": torch.zeros(1), "losses": []}
        match_distributions(digits.images, digits.labels, 3, 1, state=state)
