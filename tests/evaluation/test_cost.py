"""Multiply-accumulates by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from krdistill.errors import ArgumentError
from krdistill.evaluation import multiply_accumulates
from krdistill.models.network import build_network


def test_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 9, 5))
    assert multiply_accumulates(network, torch.zeros(7, 3, 7, 7)) == 9 * 4 * 27 + 36 * 5


def test_the_mode_and_the_statistics_stay_as_they_were() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    assert multiply_accumulates(network, torch.ones(1, 1, 2, 2)) == 8
    assert network.training and network[1].num_batches_tracked == 0
    assert multiply_accumulates(network.eval(), torch.ones(1, 1, 2, 2)) == 8
    assert not network.training


def test_attention_counts() -> None:
    network = nn.MultiheadAttention(8, 2, bias=False, batch_first=True)

    class Self(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network

        def forward(self, x: Tensor) -> Tensor:
            return network(x, x, x, need_weights=True)[0]

    projections, products = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8
    assert multiply_accumulates(Self(), torch.randn(1, 5, 8)) == projections + products


def test_what_pytorch_does_not_compute_is_not_known() -> None:
    class Elsewhere(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() * 2)

    assert multiply_accumulates(Elsewhere(), torch.ones(2, 3)) is None


def test_no_rows() -> None:
    with pytest.raises(ArgumentError, match="expected an example"):
        multiply_accumulates(nn.Linear(2, 2), torch.zeros(0, 2))


def test_networks_of_every_size_of_batch_cost_the_same() -> None:
    network = build_network("resnet8w8", class_names=("a", "b"), images=torch.zeros(4, 8, 8, 3, dtype=torch.uint8))
    found = {multiply_accumulates(network, network.example_inputs()[:n]) for n in (1, 2)}
    assert len(found) == 1 and found.pop() > 10_000
