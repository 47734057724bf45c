from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError, DataError
from krdistill.losses.cross_entropy import cross_entropy
from krdistill.losses.label_aware_smoothing import (
    SHAPES,
    LabelAwareSmoothing,
    label_aware_smoothing,
    smoothing_factors,
)

COUNTS = [500, 300, 130, 40, 10]


def _case(B: int = 9, K: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(B, K, generator=gen, dtype=torch.float64)
    smoothing = 0.4 * torch.rand(K, generator=gen, dtype=torch.float64)
    return z, torch.randint(0, K, (B,), generator=gen), smoothing


def _reference(z: Tensor, y: Tensor, smoothing: Tensor) -> np.ndarray:
    out = []
    for row, label in zip(z.double().numpy(), y.tolist(), strict=True):
        log_p = row - row.max() - math.log(np.exp(row - row.max()).sum())
        q = np.full(len(row), float(smoothing[label]) / len(row))
        q[label] += 1 - float(smoothing[label])
        out.append(-(q * log_p).sum())
    return np.array(out)


@pytest.mark.parametrize("head", [0.3, 0.4])
@pytest.mark.parametrize("tail", [0.0, 0.1])
def test_factors_against_the_paper_s_formulas(head: float, tail: float) -> None:
    first, last = max(COUNTS), min(COUNTS)
    for k, n in enumerate(COUNTS):
        angle = (n - last) * math.pi / (2 * (first - last))
        expected = {
            "concave": tail + (head - tail) * math.sin(angle),
            "linear": tail + (head - tail) * (n - last) / (first - last),
            "convex": head + (head - tail) * math.sin(1.5 * math.pi + angle),
        }
        for shape, value in expected.items():
            got = smoothing_factors(COUNTS, smooth_head=head, smooth_tail=tail, shape=shape)  # type: ignore[arg-type]
            assert float(got[k]) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_rise_from_tail_to_head(shape: str) -> None:
    factors = smoothing_factors(COUNTS, smooth_tail=0.1, shape=shape)  # type: ignore[arg-type]
    assert float(factors[0]) == pytest.approx(0.3) and float(factors[-1]) == pytest.approx(0.1)
    assert bool((factors.diff() < 0).all())
    equal = smoothing_factors([7, 7, 7], shape=shape)  # type: ignore[arg-type]
    torch.testing.assert_close(equal, torch.full((3,), 0.3, dtype=torch.float64))


def test_shapes_stand_above_one_another() -> None:
    concave, linear, convex = (smoothing_factors(COUNTS, shape=s)[1:-1] for s in ("concave", "linear", "convex"))
    assert bool((concave > linear).all()) and bool((linear > convex).all())


@pytest.mark.parametrize(("B", "K"), [(9, 5), (1, 2), (3, 8142)])
def test_value(B: int, K: int) -> None:
    z, y, smoothing = _case(B, K)
    loss = label_aware_smoothing(z, y, smoothing)
    assert loss.shape == (B,) and loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), _reference(z, y, smoothing), rtol=1e-10)


def test_by_hand() -> None:
    """p = 3/4 and 1/4, label 0 smoothed by 1/2: targets 3/4 and 1/4, the entropy; label 1 not at all: log 4."""
    z = torch.tensor([[math.log(3), 0.0]] * 2, dtype=torch.float64)
    loss = label_aware_smoothing(z, torch.tensor([0, 1]), torch.tensor([0.5, 0.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(loss, torch.tensor([entropy, math.log(4)], dtype=torch.float64))


def test_equal_counts_are_label_smoothing_and_no_smoothing_is_cross_entropy() -> None:
    z, y, _ = _case()
    equal = LabelAwareSmoothing([7] * 5, smooth_head=0.25)(z, y)
    torch.testing.assert_close(equal, cross_entropy(z, y, label_smoothing=0.25))
    torch.testing.assert_close(LabelAwareSmoothing(COUNTS, smooth_head=0)(z, y), cross_entropy(z, y))


def test_every_parameter_changes_the_loss() -> None:
    z, y, _ = _case()
    base = LabelAwareSmoothing(COUNTS)(z, y)
    for other in (
        LabelAwareSmoothing(COUNTS, smooth_head=0.4),
        LabelAwareSmoothing(COUNTS, smooth_tail=0.1),
        LabelAwareSmoothing(COUNTS, shape="convex"),
        LabelAwareSmoothing(COUNTS, shape="linear"),
        LabelAwareSmoothing(COUNTS[::-1]),
    ):
        assert not torch.allclose(other(z, y), base)


def test_invariant_to_shifts_and_gradients() -> None:
    z, y, smoothing = _case(4)
    torch.testing.assert_close(label_aware_smoothing(z + 5, y, smoothing), label_aware_smoothing(z, y, smoothing))
    assert torch.autograd.gradcheck(lambda x: label_aware_smoothing(x, y, smoothing), z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_huge_logits(dtype: torch.dtype) -> None:
    z, y, smoothing = _case()
    loss = label_aware_smoothing(z.to(dtype), y, smoothing)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.numpy(), _reference(z.to(dtype), y, smoothing), rtol=1e-5, atol=1e-5)
    huge = torch.tensor([[1e4, -1e4]]).to(dtype).requires_grad_()
    value = label_aware_smoothing(huge, torch.tensor([0]), torch.tensor([0.5, 0.5]))
    assert value.item() == pytest.approx(0.25 * 2e4, rel=1e-2)
    value.sum().backward()
    assert bool(torch.isfinite(huge.grad).all())  # type: ignore[arg-type]


def test_module_keeps_its_factors_in_the_state_and_moves_them() -> None:
    module = LabelAwareSmoothing(COUNTS)
    assert list(module.state_dict()) == ["smoothing"] and module.smoothing.dtype == torch.float32
    assert "shape='concave'" in repr(module)
    assert module.to("meta").smoothing.device.type == "meta"


def test_bad_input() -> None:
    z, y, smoothing = _case()
    for arguments, match in (
        ((z[0], y, smoothing), "logits"),
        ((z, y - 5, smoothing), "labels"),
        ((z, y, smoothing[:2]), "smoothing"),
        ((z, y, smoothing + 1), "smoothing"),
        ((z, y, smoothing - 1), "smoothing"),
    ):
        with pytest.raises(ArgumentError, match=match):
            label_aware_smoothing(*arguments)
    for options, match in (
        ({"smooth_head": 1.0}, "smooth_head"),
        ({"smooth_tail": 0.35}, "smooth_tail"),
        ({"smooth_tail": -0.1}, "smooth_tail"),
        ({"shape": "round"}, "shape"),
    ):
        with pytest.raises(ArgumentError, match=match):
            LabelAwareSmoothing(COUNTS, **options)
    with pytest.raises(DataError, match="no training image"):
        smoothing_factors([4, 0])
