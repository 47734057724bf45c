from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from krdistill.errors import ArgumentError
from krdistill.losses import Projector, cosine_distance, squared_distance

DISTANCES = [cosine_distance, squared_distance]
distances = pytest.mark.parametrize("distance", DISTANCES)


def _pair(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, generator=g).to(dtype), torch.randn(6, 4, generator=g).to(dtype)


def test_values_against_numpy_and_by_hand() -> None:
    f, r = _pair(torch.float64)
    a, b = f.numpy(), r.numpy()
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert np.allclose(cosine_distance(f, r).numpy(), 1 - cosine, atol=1e-14)
    assert np.allclose(squared_distance(f, r).numpy(), 2 - 2 * cosine, atol=1e-14)
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [5.0, 5.0]])
    e = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert cosine_distance(x, e).tolist() == pytest.approx([0, 1, 2, 1 - math.sqrt(0.5)], abs=1e-6)
    assert squared_distance(x, e).tolist() == pytest.approx([0, 2, 4, 2 - math.sqrt(2)], abs=1e-6)


@distances
def test_lengths_do_not_count_and_equal_directions_are_at_zero(distance) -> None:  # type: ignore[no-untyped-def]
    f, r = _pair()
    assert torch.allclose(distance(1e-3 * f, 1e5 * r), distance(f, r), atol=1e-5)
    assert torch.allclose(distance(3 * f, f), torch.zeros(6), atol=1e-6)


@distances
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(distance, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    f, r = _pair(dtype)
    f = (f * 1e4).requires_grad_()  # squares would overflow in float16
    got = distance(f, r)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), distance(f.detach().double(), r.double()), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(distance(f, r), got)
    got.sum().backward()
    assert f.grad is not None and torch.isfinite(f.grad).all()


@distances
def test_gradients_reach_the_student_alone(distance) -> None:  # type: ignore[no-untyped-def]
    f, r = _pair(torch.float64)
    f.requires_grad_()
    r.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: distance(x, r), (f,))
    distance(f, r).sum().backward()
    assert r.grad is None
    assert f.grad is not None and torch.allclose((f.grad * f).sum(1), torch.zeros(6).double(), atol=1e-12)


@distances
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-10, 1e-6])
def test_vanishing_vectors_have_finite_values_and_gradients(distance, size: float) -> None:  # type: ignore[no-untyped-def]
    f = torch.full((2, 4), size, requires_grad=True)
    r = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    value = distance(f, r)
    value.sum().backward()
    assert torch.isfinite(value).all() and f.grad is not None and torch.isfinite(f.grad).all()
    if size == 0.0:
        assert value[0] == 1 and float(f.grad.abs().max()) <= 2


@distances
def test_one_sample_and_bad_shapes(distance) -> None:  # type: ignore[no-untyped-def]
    f, r = _pair()
    assert torch.allclose(distance(f[:1], r[:1]), distance(f, r)[:1])
    with pytest.raises(ArgumentError, match=r"target_features: expected shape \(B, D\) = \(6, 4\)"):
        distance(f, r[:, :3])
    with pytest.raises(ArgumentError, match="target_features"):
        distance(f, r[:5])
    with pytest.raises(ArgumentError, match=r"student_features: .* shape \(B, D\)"):
        distance(f.reshape(6, 2, 2), r)


@pytest.mark.parametrize(("d_s", "d_t"), [(6, 9), (9, 6), (7, 7)])
def test_projector_starts_orthogonal_and_reproducible(d_s: int, d_t: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        first = Projector(d_s, d_t)
        torch.manual_seed(3)
        second = Projector(d_s, d_t)
    weight = first.linear.weight.detach()
    assert weight.shape == (d_t, d_s)
    gram = weight.T @ weight if d_t >= d_s else weight @ weight.T
    assert torch.allclose(gram, torch.eye(min(d_s, d_t)), atol=1e-5)
    assert not first.linear.bias.detach().any()
    assert torch.equal(weight, second.linear.weight)
    x = torch.randn(5, d_s, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(first(x), x @ weight.T, atol=1e-6)
    assert first(x.half()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert first(x).dtype == torch.bfloat16


def test_projector_draws_nothing_but_its_weight_and_refuses_bad_widths() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Projector(4, 6)
        after = torch.random.get_rng_state()
        torch.manual_seed(0)
        torch.nn.init.orthogonal_(torch.empty(6, 4))
        assert torch.equal(after, torch.random.get_rng_state())
    for bad in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="student_dim: expected a whole number >= 1"):
            Projector(bad, 4)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"student_features: expected shape \(B, D_s\) = \(5, 4\)"):
        Projector(4, 6)(torch.zeros(5, 3))
