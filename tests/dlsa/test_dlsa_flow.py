"""The flow of DLSA: invertible, with the right determinant, a density; fitted, deterministic and robust."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import Tensor

from krdistill.dlsa.clusters import cluster_counts, size_entropy
from krdistill.dlsa.flow import FlowWeights, MixtureFlow, assign, fit_flow, random_pairs
from krdistill.errors import ArgumentError, DataError, MissingDependencyError

pytest.importorskip("zuko")

SMALL = {"epochs": 6, "batch_size": 64, "hidden": 16}


def stirred(dim: int, clusters: int = 3, dtype: torch.dtype = torch.float64) -> MixtureFlow:
    """A flow away from its start, with columns of unlike scales."""
    flow = MixtureFlow(dim, clusters, hidden=16, seed=3).to(dtype)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    flow.standardise(rows(40, dim, dtype) * torch.linspace(0.5, 4, dim, dtype=dtype) + 1)
    return flow


def rows(number: int, dim: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(number, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(counts: list[int], dim: int = 8, seed: int = 0, apart: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """A long-tailed mixture: rows, labels and the classes' means."""
    means = apart * rows(len(counts), dim, torch.float32, seed=100)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return means[labels] + rows(len(labels), dim, torch.float32, seed), labels, means


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_flow_is_invertible(dim: int) -> None:
    flow, x = stirred(dim), rows(9, dim)
    torch.testing.assert_close(flow.inverse(flow(x)[0]), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_the_log_determinant_is_that_of_the_jacobian(dim: int) -> None:
    flow, x = stirred(dim), rows(4, dim)
    _, found = flow(x)
    for i in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda r: flow(r.unsqueeze(0))[0].squeeze(0), x[i])
        torch.testing.assert_close(found[i], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-8, atol=1e-8)


def test_the_density_integrates_to_one_in_one_and_two_dimensions() -> None:
    line = torch.linspace(-60, 60, 8001, dtype=torch.float64)
    density = stirred(1).log_joint(line[:, None]).logsumexp(1).exp().detach()
    assert float(torch.trapezoid(density, line)) == pytest.approx(1, abs=1e-3)
    flow = MixtureFlow(2, 3, hidden=8, seed=1).double()
    side = torch.linspace(-14, 14, 281, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side)
    density = flow.log_joint(grid).logsumexp(1).exp().detach().view(281, 281)
    assert float(torch.trapezoid(torch.trapezoid(density, side), side)) == pytest.approx(1, abs=5e-3)


def test_the_posterior_is_of_the_latent_place_alone() -> None:
    flow, x = stirred(4), rows(6, 4)
    u, joint = flow.place(x)
    distance = torch.cdist(u, flow.centres).square()
    torch.testing.assert_close(joint.softmax(1), (-0.5 * distance).softmax(1), rtol=1e-9, atol=1e-9)
    assert torch.equal(joint.argmax(1), distance.argmin(1))
    density, cluster, latent = assign(flow, x)
    assert torch.equal(cluster, joint.argmax(1)) and torch.equal(latent, u)
    torch.testing.assert_close(density, joint.logsumexp(1))


def test_a_row_is_placed_the_same_in_any_company() -> None:
    flow, x = stirred(4), rows(6, 4)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(flow.log_joint(x)[order], flow.log_joint(x[order]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.log_joint(x[:1]), flow.log_joint(x)[:1], rtol=1e-12, atol=1e-12)


def test_centres_are_as_far_apart_at_every_width() -> None:
    for dim in (64, 512):
        centres = MixtureFlow(dim, 40, hidden=8).centres
        assert float(torch.pdist(centres).mean()) == pytest.approx(0.05 * math.sqrt(2 * 2048), rel=0.1)


def test_pairs_are_of_different_classes_and_every_class_is_drawn_alike() -> None:
    labels = torch.tensor([0] * 96 + [2] * 3 + [5])[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    one, other = random_pairs(labels, 3000, torch.Generator().manual_seed(1))
    assert bool((labels[one] != labels[other]).all())
    for side in (one, other):
        share = torch.bincount(labels[side], minlength=6)[[0, 2, 5]] / 3000
        torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
        assert len(side.unique()) > 50
    assert random_pairs(torch.zeros(5, dtype=torch.long), 4, torch.Generator())[0].numel() == 0


def test_fitting_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    x, y, _ = mixture([40, 10, 1])
    before = torch.random.get_rng_state()
    first, _ = fit_flow(x, y, 3, clusters=4, seed=7, **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(123)
    again, _ = fit_flow(x, y, 3, clusters=4, seed=7, **SMALL)
    other, _ = fit_flow(x, y, 3, clusters=4, seed=8, **SMALL)
    torch.random.set_rng_state(before)
    assert torch.equal(first.log_joint(x), again.log_joint(x))
    assert not torch.allclose(first.log_joint(x), other.log_joint(x))


def test_fitting_makes_rare_rows_likely_and_clusters_equal() -> None:
    x, y, _ = mixture([160, 40, 10, 4])
    plain = MixtureFlow(8, 6, hidden=16, seed=2)
    plain.standardise(x)
    start = assign(plain, x)
    flow, found = fit_flow(x, y, 4, clusters=6, epochs=25, batch_size=64, hidden=16, lr=5e-3, seed=2)
    density, cluster, _ = assign(flow, x)
    rare = y == 3
    assert density[rare].mean() > start[0][rare].mean() + 1
    sizes = cluster_counts(cluster, y, 6, 4).sum(1)
    assert size_entropy(sizes) > 0.8
    assert found["losses"][-1]["likelihood"] < found["losses"][0]["likelihood"]
    assert 1 <= found["epoch"] <= 25


def test_purity_pulls_classes_apart() -> None:
    x, y, _ = mixture([60, 60, 60], apart=1.0)

    def together(purity: float) -> float:
        """How likely two rows of different classes share their cluster."""
        weights = FlowWeights(likelihood=2, purity=purity)
        flow, _ = fit_flow(x, y, 3, clusters=3, weights=weights, epochs=25, batch_size=64, hidden=16, lr=5e-3)
        shares = cluster_counts(assign(flow, x)[1], y, 3, 3).double() / 60
        return float(sum(shares[:, a] @ shares[:, b] for a, b in ((0, 1), (0, 2), (1, 2))) / 3)

    assert together(1.0) < together(0.0) - 0.04


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes_and_odd_data(dtype: torch.dtype) -> None:
    x, y, _ = mixture([20, 3, 1])
    x[:, 2] = 4.0  # a constant column
    x[:, 3] *= 1000
    flow, _ = fit_flow(x.to(dtype), y, 5, clusters=3, **SMALL)  # two classes have no row
    wide = torch.promote_types(dtype, torch.float32)
    joint = flow.log_joint(x.to(dtype).to(wide))
    assert joint.dtype == wide and bool(joint.isfinite().all())
    assert not any(p.requires_grad for p in flow.parameters())


def test_one_class_alone_one_column_and_as_many_clusters_as_rows() -> None:
    x, y = rows(6, 1, torch.float32), torch.zeros(6, dtype=torch.long)
    flow, found = fit_flow(x, y, 1, clusters=6, **SMALL)
    assert bool(flow.log_joint(x).isfinite().all()) and "purity" in found["losses"][0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"clusters": 99}, DataError, "99 clusters for 43 rows"),
        ({"clusters": 0}, ArgumentError, "clusters: expected a whole number"),
        ({"epochs": 0}, ArgumentError, "epochs"),
        ({"lr": -1.0}, ArgumentError, "lr"),
        ({"lr": 1e30}, DataError, "diverged in epoch"),
        ({"batch_size": 0}, ArgumentError, "batch_size"),
        ({"hidden": 0}, ArgumentError, "hidden"),
        ({"centre_std": 0.0}, ArgumentError, "centre_std"),
        ({"decay": 1.0}, ArgumentError, "decay"),
        ({"power": -1.0}, ArgumentError, "power"),
    ],
)
def test_bad_arguments_are_refused_in_words(change: dict[str, float], error: type[Exception], words: str) -> None:
    x, y, _ = mixture([40, 2, 1])
    with pytest.raises(error, match=words):
        fit_flow(x, y, 3, **{"clusters": 3, **SMALL, **change})  # type: ignore[arg-type]


def test_bad_rows_are_refused_in_words() -> None:
    x, y, _ = mixture([10, 2])
    broken = x.clone()
    broken[3, 1] = math.nan
    for bad, labels, words in (
        (broken, y, "row 3 holds NaN"),
        (x[:0], y[:0], "at least one row"),
        (x, y[:-1], "integer tensor of shape"),
        (x, y + 1, "class indices in 0..1"),
        (x[0], y, "shape \\(N, D\\)"),
    ):
        with pytest.raises(ArgumentError, match=words):
            fit_flow(bad, labels, 2, clusters=2)
    with pytest.raises(ArgumentError, match="purity"):
        FlowWeights(purity=-1)
    with pytest.raises(ArgumentError, match="x: expected shape"):
        MixtureFlow(3, 2)(x)


def test_without_zuko_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'krdistill\[dlsa\]'"):
        MixtureFlow(3, 2)
