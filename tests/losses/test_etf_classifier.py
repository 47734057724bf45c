from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from krdistill.anchors import balanced_anchors, simplex_etf
from krdistill.errors import ArgumentError
from krdistill.losses.etf_classifier import DotRegression, ETFHead, dot_regression_loss
from krdistill.models.network import Network, build_network


def _case(B: int = 9, K: int = 5, D: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    features = torch.nn.functional.normalize(torch.randn(B, D, generator=gen, dtype=torch.float64), dim=1)
    anchors = torch.nn.functional.normalize(torch.randn(K, D, generator=gen, dtype=torch.float64), dim=1)
    return features, torch.randint(0, K, (B,), generator=gen), anchors


@pytest.mark.parametrize(("B", "K"), [(9, 5), (1, 2), (3, 8142)])
@pytest.mark.parametrize("length", [1.0, 2.5])
def test_value(B: int, K: int, length: float) -> None:
    h, y, m = _case(B, K)
    loss = dot_regression_loss(h, y, m, length=length)
    expected = [
        0.5 * (sum(a * b for a, b in zip(row, m[k].tolist(), strict=True)) - length) ** 2 / length
        for row, k in zip(h.tolist(), y.tolist(), strict=True)
    ]
    assert loss.shape == (B,) and loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-12)


def test_by_hand() -> None:
    anchors = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]])
    loss = dot_regression_loss(h, torch.tensor([0, 0, 1]), anchors)
    torch.testing.assert_close(loss, torch.tensor([0.0, 2.0, 0.02]))


def test_the_pull_is_along_the_class_s_anchor_alone() -> None:
    h, y, m = _case()
    h.requires_grad_()
    m = m.requires_grad_()
    loss = dot_regression_loss(h, y, m)
    loss.sum().backward()
    dot = (h * m[y]).sum(1, keepdim=True)
    torch.testing.assert_close(h.grad, ((dot - 1) * m[y]).detach())
    assert m.grad is None
    others = m.detach().clone()
    others[y.unique()[0]] = -1
    changed = dot_regression_loss(h, y, others)
    assert torch.equal(changed[y != y.unique()[0]], loss[y != y.unique()[0]])


def test_length_changes_the_loss_and_gradients() -> None:
    h, y, m = _case(4)
    assert not torch.allclose(dot_regression_loss(h, y, m, length=1.1), dot_regression_loss(h, y, m))
    assert torch.autograd.gradcheck(lambda x: dot_regression_loss(x, y, m, length=1.3), h.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_and_huge_features(dtype: torch.dtype) -> None:
    h, y, m = _case()
    loss = dot_regression_loss(h.to(dtype), y, m)
    assert loss.dtype == torch.float32
    exact = dot_regression_loss(h.to(dtype).double(), y, m)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(dot_regression_loss((1e4 * h).to(dtype), y, m)).all())


@pytest.mark.parametrize(("K", "D"), [(2, 1), (2, 6), (5, 4), (10, 64)])
def test_head_holds_a_simplex(K: int, D: int) -> None:
    head = ETFHead(D, K, seed=3)
    gram = head.weight @ head.weight.T
    expected = torch.full((K, K), -1 / (K - 1)) + torch.eye(K) * K / (K - 1)
    torch.testing.assert_close(gram, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(head.weight, simplex_etf(K, D, seed=3, dtype=torch.float32))


def test_head_takes_the_most_even_anchors_where_there_is_no_simplex() -> None:
    head = ETFHead(6, 10)
    torch.testing.assert_close(head.weight, balanced_anchors(10, 6))
    assert float((head.weight @ head.weight.T - torch.eye(10)).max()) < 1e-5


def test_head_logits() -> None:
    gen = torch.Generator().manual_seed(0)
    f = 5 + 3 * torch.randn(12, 7, generator=gen)
    head = ETFHead(7, 5, scale=4)
    x = f.double().numpy()
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + head.norm.eps)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    np.testing.assert_allclose(head.normalise(f).detach().numpy(), x, atol=1e-5)
    head = ETFHead(7, 5, scale=4)
    np.testing.assert_allclose(head(f).detach().numpy(), 4 * x @ head.weight.double().numpy().T, atol=1e-5)
    assert not torch.allclose(ETFHead(7, 5, scale=5)(f), head(f))
    assert not torch.allclose(ETFHead(7, 5, scale=4, seed=1)(f), head(f))
    head.eval()
    assert head(f[:1]).shape == (1, 5) and head(f.half()).dtype == torch.float32


def test_loss_on_the_head_s_logits_is_the_loss_on_features() -> None:
    f, y, _ = _case()
    head = ETFHead(7, 5, scale=8).double()
    expected = dot_regression_loss(head.normalise(f), y, head.weight)
    torch.testing.assert_close(DotRegression(scale=8)(head(f), y), expected)
    assert not torch.allclose(DotRegression(scale=9)(head(f), y), expected)
    assert not torch.allclose(DotRegression(scale=8, length=1.2)(head(f), y), expected)
    assert DotRegression()(head(f).half(), y).dtype == torch.float32 and "scale=30.0" in repr(DotRegression())


def test_only_the_normalisation_is_learned_and_the_state_holds_the_anchors() -> None:
    head = ETFHead(7, 5)
    assert {name for name, _ in head.named_parameters()} == {"norm.weight", "norm.bias"}
    assert "weight" in head.state_dict() and isinstance(head, nn.Linear) and head.bias is None
    other = ETFHead(7, 5, seed=9)
    assert not torch.equal(other.weight, head.weight)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.weight, head.weight)
    assert head.to("meta").weight.device.type == "meta"


def test_global_generator_is_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a, b = ETFHead(7, 5, seed=4), ETFHead(7, 5, seed=4)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(a.weight, b.weight)


def test_head_replaces_a_network_s_head_and_learns() -> None:
    gen = torch.Generator().manual_seed(0)
    images = torch.randint(0, 60, (24, 8, 8, 1), generator=gen, dtype=torch.uint8)
    labels = torch.arange(24) % 3
    for c in range(3):
        images[labels == c, :, 2 * c + 1] += 180
    names = ("a", "b", "c")
    backbone = build_network("resnet8", class_names=names, images=images).backbone
    backbone.head = ETFHead(backbone.head.in_features, 3)  # type: ignore[arg-type, union-attr]
    network = Network(backbone, class_names=names, mean=[0.3], std=[0.2], image_size=(8, 8))
    loss = DotRegression()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    anchors = backbone.head.weight.clone()
    batch = images.permute(0, 3, 1, 2)
    values = []
    for _ in range(15):
        optimizer.zero_grad()
        out = network(batch)
        value = loss(out.logits, labels).mean()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.1 * values[0]
    assert bool((network(batch).logits.argmax(1) == labels).all())
    assert torch.equal(backbone.head.weight, anchors)


def test_bad_input() -> None:
    h, y, m = _case()
    for arguments, match in (
        ((h[0], y, m), "features"),
        ((h, y, m[:, :3]), "anchors"),
        ((h, y + 5, m), "labels"),
        ((h, y[:3], m), "labels"),
    ):
        with pytest.raises(ArgumentError, match=match):
            dot_regression_loss(*arguments)
    with pytest.raises(ArgumentError, match="length"):
        dot_regression_loss(h, y, m, length=0)
    with pytest.raises(ArgumentError, match="scale"):
        DotRegression(scale=-1)
    with pytest.raises(ArgumentError, match="labels"):
        DotRegression()(h, y + 7)
    with pytest.raises(ArgumentError, match="num_classes"):
        ETFHead(4, 1)
    with pytest.raises(ArgumentError, match="scale"):
        ETFHead(4, 3, scale=0)
    with pytest.raises(ArgumentError, match="features"):
        ETFHead(4, 3)(torch.zeros(5, 3))
    with pytest.raises(ArgumentError, match="at least 2 rows in training"):
        ETFHead(4, 3)(torch.zeros(1, 4))
