from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from krdistill.errors import ArgumentError, ModelError
from krdistill.losses.simkd import ReusedClassifier, SimKD, simkd_loss
from krdistill.models import create_model
from krdistill.models.network import Network


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class _Student(nn.Module):
    """The least that is asked of a student."""

    map_channels = (3, 6)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.second = nn.Conv2d(3, 6, 3, stride=2, padding=1)

    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.first(x)
        return first, self.second(first.relu())


def _network(factor: int = 2, D: int = 8, K: int = 5) -> tuple[ReusedClassifier, nn.Linear]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(D, K)
        return ReusedClassifier(_Student(), head, factor=factor), head


def test_loss_follows_the_formula() -> None:
    s, t = _randn(3, 4, 2, 5, dtype=torch.float64), _randn(3, 4, 2, 5, seed=1, dtype=torch.float64)
    expected = ((s.numpy() - t.numpy()) ** 2).reshape(3, -1).mean(1)
    np.testing.assert_allclose(simkd_loss(s, t), expected, rtol=1e-12)
    assert torch.equal(SimKD()(s, t, torch.zeros(3)), simkd_loss(s, t))
    assert float(simkd_loss(t, t).max()) == 0


def test_the_larger_map_is_averaged_by_hand() -> None:
    large = torch.arange(16.0).view(1, 1, 4, 4)
    small = torch.tensor([[[[2.5, 4.5], [10.5, 12.5]]]])  # means of the four quarters
    assert float(simkd_loss(small, large)) == 0 and float(simkd_loss(large, small)) == 0
    assert float(simkd_loss(large, torch.full((1, 1, 1, 1), 5.5))) == pytest.approx(4)  # mean 7.5
    assert float(simkd_loss(torch.zeros(1, 1, 1, 4), torch.ones(1, 1, 4, 1))) == pytest.approx(1)  # both to 1x1


def test_loss_gradients_and_precision() -> None:
    s, t = _randn(2, 3, 4, 4, dtype=torch.float64), _randn(2, 3, 2, 2, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: simkd_loss(x, t), s.requires_grad_())
    simkd_loss(s, t).sum().backward()
    assert t.grad is None
    for dtype in (torch.float16, torch.bfloat16):
        a, b = (1e3 * s.detach()).to(dtype), (1e3 * t.detach()).to(dtype)
        loss = simkd_loss(a, b)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), simkd_loss(a.double(), b.double()), rtol=1e-5, atol=0)
    huge = 1e4 * s.detach().float()
    assert bool(torch.isfinite(simkd_loss(huge, -huge)).all())


def test_the_network_follows_the_description() -> None:
    network, head = _network()
    network.eval()
    x = _randn(3, 2, 16, 16)
    maps = network.forward_maps(x)
    assert [tuple(m.shape) for m in maps] == [(3, 3, 8, 8), (3, 6, 4, 4), (3, 8, 4, 4)]
    assert network.map_channels == (3, 6, 8) and network.feature_dim == 8
    convolutions = [m for m in network.projector if isinstance(m, nn.Conv2d)]
    assert [tuple(c.weight.shape) for c in convolutions] == [(4, 6, 1, 1), (4, 4, 3, 3), (8, 4, 1, 1)]
    y = maps[1]
    for c in convolutions:
        y = (F.conv2d(y, c.weight, padding=c.kernel_size[0] // 2) / math.sqrt(1 + 1e-5)).relu()
    torch.testing.assert_close(maps[2], y)
    feature = y.mean((2, 3))
    torch.testing.assert_close(network.forward_features(x), feature)
    torch.testing.assert_close(network(x), feature @ head.weight.T + head.bias)
    assert torch.equal(network.head(network.forward_features(x)), network(x))


def test_factor_reaches_the_bottleneck() -> None:
    for factor, width in ((1, 8), (4, 2), (100, 1)):
        assert _network(factor)[0].projector[0].out_channels == width


def test_the_head_is_a_frozen_copy() -> None:
    network, head = _network()
    before = copy.deepcopy(head)
    assert head.weight.requires_grad and not any(p.requires_grad for p in network.head.parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1, weight_decay=0.1)
    target = _randn(4, 8, 4, 4, seed=1).relu()
    losses = []
    for _ in range(15):
        loss = simkd_loss(network.forward_maps(_randn(4, 2, 16, 16))[-1], target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    for layer in (network.head, head):
        assert torch.equal(layer.weight, before.weight) and torch.equal(layer.bias, before.bias)
    with torch.no_grad():
        network.head.weight.zero_()
    assert torch.equal(head.weight, before.weight)


def test_our_networks_serve_as_student_and_teacher() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = create_model("resnet8", num_classes=10)
        teacher = create_model("resnet20", num_classes=10).eval()
        network = ReusedClassifier(student, teacher.head)
    own = sum(p.numel() for p in student.parameters())
    assert isinstance(student.head, nn.Identity)  # no weights that nothing uses
    assert sum(p.numel() for p in network.parameters()) == own + sum(
        p.numel() for part in (network.projector, network.head) for p in part.parameters()
    )
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    maps = network.forward_maps(x)
    assert [m.shape[1] for m in maps] == list(network.map_channels)
    with torch.no_grad():
        target = teacher.forward_maps(x)[-1]
    loss = simkd_loss(maps[-1], target)
    loss.mean().backward()
    assert all(p.grad is not None for p in network.parameters() if p.requires_grad)
    # a student that hits the teacher's map answers as the teacher does
    torch.testing.assert_close(network.head(network.pool(target)), teacher(x))

    wrapped = Network(
        network.eval(), class_names=[str(k) for k in range(10)], mean=[0.5] * 3, std=[0.25] * 3, image_size=(32, 32)
    )
    outputs = wrapped(x)
    assert outputs.feature.shape == (2, teacher.feature_dim)
    torch.testing.assert_close(outputs.logits, network((x - 0.5) / 0.25))
    state = network.state_dict()
    network.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})


def test_bad_input_is_refused() -> None:
    head = nn.Linear(8, 5)
    for student in (nn.Linear(3, 4), None, _Student):
        with pytest.raises(ModelError, match=r"student: expected a network that shows its stages.*but got"):
            ReusedClassifier(student, head)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="teacher_head: expected a linear layer, but got Conv2d"):
        ReusedClassifier(_Student(), nn.Conv2d(8, 5, 1))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="factor"):
        ReusedClassifier(_Student(), head, factor=0)
    x = _randn(2, 3, 4, 4)
    for a, b in ((x, x[:1]), (x, x[:, :2]), (x[0], x[0]), (x.long(), x), (x, None), (x, x[:, :, :0])):
        with pytest.raises(ArgumentError, match=r"_map: expected .*but got"):
            simkd_loss(a, b)


def test_nan_stays_in_its_row() -> None:
    t = _randn(3, 4, 2, 2)
    t[1, 0, 0, 0] = math.nan
    assert simkd_loss(_randn(3, 4, 4, 4), t).isnan().tolist() == [False, True, False]
