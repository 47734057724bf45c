from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from krdistill.errors import ArgumentError
from krdistill.losses import reviewkd
from krdistill.losses.reviewkd import ReviewKD, hierarchical_context_loss


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _maps(B: int, shapes: list[tuple[int, int]], seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(_randn(B, c, size, size, seed=seed + i, dtype=dtype) for i, (c, size) in enumerate(shapes))


def _module(*args: object, seed: int = 0, **kwargs: object) -> ReviewKD:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ReviewKD(*args, **kwargs)  # type: ignore[arg-type]


def _pooled(x: np.ndarray, size: int) -> np.ndarray:
    """Adaptive mean of one image's map (C, H, W), position by position."""
    C, H, W = x.shape
    out = np.zeros((C, size, size))
    for i in range(size):
        for j in range(size):
            rows = slice(i * H // size, -(-(i + 1) * H // size))
            columns = slice(j * W // size, -(-(j + 1) * W // size))
            out[:, i, j] = x[:, rows, columns].mean((1, 2))
    return out


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((8, 8), [4, 2, 1]),
        ((5, 7), [4, 2, 1]),
        ((6, 8), [4, 2, 1]),
        ((4, 4), [2, 1]),
        ((3, 9), [2, 1]),
        ((2, 2), [1]),
        ((1, 1), []),
    ],
)
def test_context_loss_follows_the_formula(size: tuple[int, int], levels: list[int]) -> None:
    s, t = _randn(3, 2, *size), _randn(3, 2, *size, seed=1)
    for row, got in enumerate(hierarchical_context_loss(s, t)):
        a, b = s[row].numpy(), t[row].numpy()
        total, weights = ((a - b) ** 2).mean(), [1.0]
        for level in levels:
            weights.append(weights[-1] / 2)
            total += weights[-1] * ((_pooled(a, level) - _pooled(b, level)) ** 2).mean()
        assert float(got) == pytest.approx(total / sum(weights), rel=1e-10)


def test_context_loss_by_hand() -> None:
    # differences 1, 1, 1, -1 at full size; their mean 1/2 at size 1
    s = torch.tensor([[[[1.0, 1.0], [1.0, -1.0]]]])
    assert float(hierarchical_context_loss(s, torch.zeros_like(s))) == pytest.approx((1 + 0.25 / 2) / 1.5)
    constant = torch.full((2, 3, 8, 8), 2.0)
    torch.testing.assert_close(hierarchical_context_loss(constant + 3, constant), torch.tensor([9.0, 9.0]))
    assert torch.equal(hierarchical_context_loss(constant, constant), torch.zeros(2))


def test_context_loss_gradients_and_precision() -> None:
    s, t = _randn(2, 2, 5, 5), _randn(2, 2, 5, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: hierarchical_context_loss(x, t), s.requires_grad_())
    hierarchical_context_loss(s, t).sum().backward()
    assert t.grad is None
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (100 * s.detach()).to(dtype), (100 * t.detach()).to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = hierarchical_context_loss(a, b)
        assert loss.dtype == torch.float32  # a difference of 1e3 squared is beyond float16
        torch.testing.assert_close(loss.double(), hierarchical_context_loss(a.double(), b.double()), rtol=1e-5, atol=0)


def test_the_network_follows_the_description() -> None:
    """Two stages by hand, in evaluation mode, with the module's weights."""
    review = _module([3, 6], [4, 5], mid_channels=2).eval()
    s, t = _maps(2, [(3, 8), (6, 4)], seed=0), _maps(2, [(4, 8), (5, 2)], seed=5)
    shallow, deep = review.fusions[0], review.fusions[1]
    # fresh batch normalisation divides by sqrt(1 + eps)
    low = F.conv2d(s[1], deep.enter.weight) / math.sqrt(1 + 1e-5)
    small = low[:, :, ::2, ::2]  # nearest neighbours, 4x4 to 2x2
    answer = F.conv2d(small, deep.leave.weight, padding=1) / math.sqrt(1 + 1e-5)
    expected = hierarchical_context_loss(answer, t[1])

    high = F.conv2d(s[0], shallow.enter.weight) / math.sqrt(1 + 1e-5)
    up = low.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    attention = torch.sigmoid(F.conv2d(torch.cat([high, up], 1), shallow.attention.weight, shallow.attention.bias))
    fused = attention[:, :1] * high + attention[:, 1:] * up
    answer = F.conv2d(fused, shallow.leave.weight, padding=1) / math.sqrt(1 + 1e-5)
    expected = expected + hierarchical_context_loss(answer, t[0])
    torch.testing.assert_close(review(s, t), expected)


@pytest.mark.parametrize("cache", [1, 2 * 8 * 3 * 8 * 8, 1 << 30])  # one image at a time, two of five, all
@pytest.mark.parametrize("size", [4, 3, 16])
def test_joined_maps_and_their_gradients(cache: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a 1x1 convolution of the two maps, stacked, at full size, by autograd."""
    monkeypatch.setattr(reviewkd, "_CACHE", cache)
    x, deeper = _maps(5, [(3, 8), (3, size)], seed=0, dtype=torch.float64)
    inputs = [x, deeper, _randn(2, 6, 1, 1, seed=3), _randn(2, seed=4)]
    slope = _randn(5, 3, 8, 8, seed=5)
    found = []
    for piecewise in (True, False):
        leaves = [y.clone().to(memory_format=torch.channels_last) if y.ndim == 4 else y.clone() for y in inputs]
        x, deeper, weight, bias = (y.requires_grad_() for y in leaves)
        if piecewise:
            joined = reviewkd._Join.apply(x, deeper, weight, bias)
        else:
            up = F.interpolate(deeper, size=(8, 8), mode="nearest")
            share = torch.sigmoid(F.conv2d(torch.cat([x, up], 1), weight, bias))
            joined = share[:, :1] * x + share[:, 1:] * up
        joined.backward(slope)
        found.append([joined.detach(), *(y.grad for y in leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([(4, 8), (8, 4), (16, 2)], [(6, 8), (12, 4), (24, 2)]),
        ([(4, 8), (8, 4), (16, 2), (16, 1)], [(6, 16), (12, 4), (24, 1)]),  # four stages to three, a 1x1 map
        ([(8, 4)], [(6, 8), (12, 3), (24, 2)]),  # one stage to three
        ([(4, 1), (8, 1)], [(6, 1), (12, 1)]),  # 1x1 throughout
        ([(4, 4), (8, 8)], [(6, 3), (12, 5)]),  # sizes that grow, and do not divide
    ],
)
def test_any_stages_and_sizes(student: list[tuple[int, int]], teacher: list[tuple[int, int]]) -> None:
    review = _module([c for c, _ in student], [c for c, _ in teacher])
    s = tuple(x.requires_grad_() for x in _maps(3, student, seed=0))
    t = tuple(x.requires_grad_() for x in _maps(3, teacher, seed=10))
    loss = review(s, t)
    assert loss.shape == (3,) and loss.dtype == torch.float32 and bool((loss > 0).all())
    loss.mean().backward()
    matched = min(len(s), len(t))
    for i, x in enumerate(reversed(s)):
        assert (x.grad is not None and bool(torch.isfinite(x.grad).all())) == (i < matched)
    assert all(x.grad is None for x in t)
    assert all(p.grad is not None for p in review.parameters())


def test_the_last_stages_are_matched() -> None:
    review = _module([4, 8, 16], [12, 24]).eval()
    s, t = _maps(2, [(4, 8), (8, 4), (16, 2)], seed=0), _maps(2, [(12, 4), (24, 2)], seed=9)
    loss = review(s, t)
    assert torch.equal(review((torch.zeros_like(s[0]), *s[1:]), t), loss)
    for i in (1, 2):
        changed = [torch.zeros_like(x) if j == i else x for j, x in enumerate(s)]
        assert float((review(changed, t) - loss).detach().abs().min()) > 1e-5


def test_width_of_the_fused_maps() -> None:
    assert _module([4, 600], [4, 8]).mid_channels == 512
    assert _module([4, 24], [4, 8]).mid_channels == 24
    wide, narrow = _module([4, 24], [4, 8]), _module([4, 24], [4, 8], mid_channels=3)
    s, t = _maps(2, [(4, 8), (24, 4)], seed=0), _maps(2, [(4, 8), (8, 4)], seed=9)
    assert float((wide(s, t) - narrow(s, t)).detach().abs().min()) > 1e-4
    assert narrow.fusions[0].enter.out_channels == 3 and narrow.fusions[1].attention is None
    assert "(4, 24) -> (4, 8), mid_channels=3" in repr(narrow)


def test_learning_brings_the_student_to_the_teacher() -> None:
    review = _module([4, 8], [4, 8])
    s, t = _maps(4, [(4, 8), (8, 4)], seed=0), _maps(4, [(4, 8), (8, 4)], seed=9)
    s = tuple(x.requires_grad_() for x in s)
    optimizer = torch.optim.Adam([*s, *review.parameters()], 0.05)
    first = float(review(s, t).mean().detach())
    for _ in range(40):
        optimizer.zero_grad()
        review(s, t).mean().backward()
        optimizer.step()
    assert float(review(s, t).mean().detach()) < 0.5 * first


def test_autocast_and_batches_of_one() -> None:
    review = _module([4, 8], [4, 8])
    s, t = _maps(1, [(4, 8), (8, 4)], seed=0), _maps(1, [(4, 8), (8, 4)], seed=9)
    exact = review(s, t)
    assert exact.shape == (1,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = review(s, t)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.05)
    half = review([x.bfloat16() for x in s], [x.bfloat16() for x in t])
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0.05)
    huge = review([1e4 * x for x in s], [1e4 * x for x in t])
    assert bool(torch.isfinite(huge).all())


def test_one_image_of_one_position_is_refused_in_training_alone() -> None:
    review = _module([4, 8], [4, 8])
    s, t = _maps(1, [(4, 2), (8, 1)], seed=0), _maps(1, [(4, 2), (8, 1)], seed=9)
    with pytest.raises(ArgumentError, match=r"batch normalisation in training mode.*at least 2 images, or eval"):
        review(s, t)
    assert bool(torch.isfinite(review.eval()(s, t)).all())


def test_evaluation_is_per_sample() -> None:
    review = _module([4, 8], [4, 8]).eval()
    s, t = _maps(3, [(4, 8), (8, 4)], seed=0), _maps(3, [(4, 8), (8, 4)], seed=9)
    alone = torch.cat([review([x[i : i + 1] for x in s], [x[i : i + 1] for x in t]) for i in range(3)])
    torch.testing.assert_close(review(s, t), alone)
    t[0][1, 0, 0, 0] = math.nan
    assert review(s, t).isnan().tolist() == [False, True, False]


def test_bad_input_is_refused() -> None:
    for bad in (
        lambda: ReviewKD([], [4]),
        lambda: ReviewKD([4], []),
        lambda: ReviewKD([4, 0], [4]),
        lambda: ReviewKD([4, 2.5], [4]),  # type: ignore[list-item]
        lambda: ReviewKD(4, [4]),  # type: ignore[arg-type]
        lambda: ReviewKD("48", [4]),  # type: ignore[arg-type]
        lambda: ReviewKD([4], [4], mid_channels=0),
    ):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            bad()
    review = _module([4, 8], [4, 8])
    s, t = _maps(2, [(4, 8), (8, 4)], seed=0), _maps(2, [(4, 8), (8, 4)], seed=9)
    for bad_s, bad_t in (
        (s[:1], t),
        (s, t[:1]),
        (s[::-1], t),
        (s, t[::-1]),
        (s, [x[:1] for x in t]),
        ((s[0], s[1][:1]), t),
        (s[0], t),
        ((s[0], s[1].long()), t),
        ((s[0], s[1].flatten(2)), t),
        ((s[0], None), t),
        (None, t),
    ):
        with pytest.raises(ArgumentError, match=r"(student|teacher)_maps.*expected .*but got"):
            review(bad_s, bad_t)
    for a, b in ((s[0], t[1]), (s[0], t[0][:1]), (s[0].long(), t[0]), (s[0][0], t[0][0]), (s[0], None)):
        with pytest.raises(ArgumentError, match=r"_map: expected .*but got"):
            hierarchical_context_loss(a, b)
