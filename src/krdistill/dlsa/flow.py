"""A normalising flow with a mixture of Gaussians behind it: where a row lies, how likely it is, whose cluster it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_finite, check_integer, check_labels, check_matrix, check_number, like
from ..errors import ArgumentError, DataError, MissingDependencyError
from ..rng import forked, generator
from .clusters import cluster_counts, pure_clusters
from .losses import RunningShares, balance_loss, likelihood_loss, likelihood_weights, mixture_log_joint, purity_loss

_CHUNK = 4096  # rows in work at once
_CENTRE_STD, _LIKELIHOOD, _AUTHORS_DIM = 0.05, 2.0, 2048  # the authors' values, and the features they are meant for
_LARGEST = 20  # a cluster of more than so many times the mean size has swallowed the others


class MixtureFlow(nn.Module):
    r"""A masked autoregressive flow from features to a mixture of M fixed unit Gaussians.

    .. math:: u = g(x), \qquad
        \log p(x, k) = \log N(u; \mu_k, I) - \log M + \log \left|\det \tfrac{\partial u}{\partial x}\right|

    The centres are drawn from :math:`N(0, s^2 I)` once and stay.

    Args:
        dim: D >= 1.
        clusters: M >= 1.
        blocks: autoregressive transforms; every second one takes the columns in reverse order.
        hidden: units of each one's hidden layer.
        centre_std: s > 0; None takes :math:`0.05 \sqrt{2048 / D}`, under which centres are as far apart at every D as
            the authors' 0.05 puts them in their 2048 dimensions.
        seed: of centres and weights; the global generator is left as it is.

    Raises:
        MissingDependencyError: zuko is not installed.

    Source: Xu et al., ECCV 2022, arXiv 2208.02567; Papamakarios et al., "Masked Autoregressive Flow for Density
    Estimation", NeurIPS 2017, arXiv 1705.07057.
    Deviation: the columns are standardised once (:meth:`standardise`), where the authors normalise between the blocks
    by batch; so a row's place does not depend on the batch.
    """

    shift: Tensor
    log_scale: Tensor
    centres: Tensor

    def __init__(
        self,
        dim: int,
        clusters: int,
        *,
        blocks: int = 2,
        hidden: int = 256,
        centre_std: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        D = check_integer("dim", dim, at_least=1)
        M = check_integer("clusters", clusters, at_least=1)
        if centre_std is None:
            centre_std = _CENTRE_STD * math.sqrt(_AUTHORS_DIM / D)
        centre_std = check_number("centre_std", centre_std, above=0)
        try:
            from zuko.flows import MAF
        except ImportError:
            raise MissingDependencyError(
                "DLSA needs the package zuko for its normalising flow: pip install 'krdistill[dlsa]'."
            ) from None
        with forked(seed, "dlsa-flow"):
            self.transforms = MAF(
                D,
                transforms=check_integer("blocks", blocks, at_least=1),
                hidden_features=(check_integer("hidden", hidden, at_least=1),),
            ).transform
        centres = torch.randn(M, D, generator=generator(seed, "dlsa-centres"))
        self.register_buffer("centres", centre_std * centres)
        self.register_buffer("shift", torch.zeros(D))
        self.register_buffer("log_scale", torch.zeros(D))

    @property
    def dim(self) -> int:
        return self.centres.shape[1]

    @property
    def clusters(self) -> int:
        return self.centres.shape[0]

    @torch.no_grad()
    def standardise(self, features: Tensor) -> None:
        """Sets what every column is shifted and scaled by, from rows ``(N, D)``; a constant column is only shifted."""
        check_finite("features", check_matrix("features", features, "(N, D)", columns=self.dim))
        wide = features.cpu().double()  # not every device has float64
        mean, std = wide.mean(0), wide.std(0, correction=0)
        std = torch.where(std > 1e-6 * wide.abs().amax(0), std, 1.0)
        self.shift.copy_(mean)
        self.log_scale.copy_(-std.log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``(N, D)`` to u ``(N, D)`` and log |det du/dx| ``(N,)``."""
        check_matrix("x", x, "(N, D)", columns=self.dim)
        u, log_det = self.transforms().call_and_ladj((x - self.shift) * self.log_scale.exp())
        return u, log_det + self.log_scale.sum()

    def inverse(self, u: Tensor) -> Tensor:
        """u ``(N, D)`` to x; one pass per column."""
        check_matrix("u", u, "(N, D)", columns=self.dim)
        return self.transforms().inv(u) * (-self.log_scale).exp() + self.shift

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """u ``(N, D)`` and log p(x, k) ``(N, M)`` of rows ``(N, D)``."""
        u, log_det = self(x)
        return u, mixture_log_joint(u, self.centres) + log_det.unsqueeze(1)

    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, k) of rows ``(N, D)``, shape ``(N, M)``; its logsumexp is log p(x), its softmax the posterior."""
        return self.place(x)[1]


@dataclass(frozen=True)
class FlowWeights:
    """How much each loss counts; the defaults are the authors' for ImageNet-LT.

    Attributes:
        likelihood: >= 0; None takes 2 * 2048 / D. A log-likelihood grows with the number of columns, so it stands to
            the others as the authors' 2 does in their 2048 dimensions.
        balance, purity: >= 0.
    """

    likelihood: float | None = None
    balance: float = 1.0
    purity: float = 0.02

    def __post_init__(self) -> None:
        for name in ("likelihood", "balance", "purity"):
            if name != "likelihood" or self.likelihood is not None:
                check_number(name, getattr(self, name), at_least=0)

    def at(self, dim: int) -> dict[str, float]:
        """The weights for features of D columns."""
        likelihood = _LIKELIHOOD * _AUTHORS_DIM / dim if self.likelihood is None else self.likelihood
        return {"likelihood": likelihood, "balance": self.balance, "purity": self.purity}


def random_pairs(labels: Tensor, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of different classes: two classes are drawn of those there are, then a row of each.

    Args:
        labels: shape ``(N,)``.
        number: B, of pairs.
        generator: on the CPU.

    Returns:
        Row numbers of the one and the other, ``(B,)`` each, on the CPU; none where all rows are of one class.
    """
    order = labels.cpu().argsort(stable=True)
    sizes = torch.unique_consecutive(labels.cpu()[order], return_counts=True)[1]
    C = len(sizes)
    if C < 2:
        return order[:0], order[:0]
    one = torch.randint(C, (number,), generator=generator)
    other = (one + torch.randint(1, C, (number,), generator=generator)) % C
    starts = sizes.cumsum(0) - sizes

    def row(of: Tensor) -> Tensor:
        within = (torch.rand(number, generator=generator, dtype=torch.float64) * sizes[of]).long()
        return order[starts[of] + within.clamp_max(sizes[of] - 1)]

    return row(one), row(other)


def fit_flow(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    clusters: int = 50,
    weights: FlowWeights | None = None,
    power: float = 2.0,
    epochs: int = 50,
    batch_size: int = 1024,
    lr: float = 1e-3,
    blocks: int = 2,
    hidden: int = 256,
    centre_std: float | None = None,
    decay: float = 0.7,
    seed: int = 0,
) -> tuple[MixtureFlow, dict[str, Any]]:
    r"""Fits a flow that describes the rare classes, keeps classes apart and its clusters alike in size.

    .. math:: L = \lambda_{lh} L_{lh} + \lambda_{pur} L_{pur} + \lambda_{bal} L_{bal}

    see :mod:`krdistill.dlsa.losses`. Of all epochs the one with the most pure clusters is kept
    (:func:`~krdistill.dlsa.clusters.pure_clusters`, on these rows; of equals the last), among those whose largest
    cluster has at most 20 times the mean size; where there is none, the last.

    Args:
        features: training rows, shape ``(N, D)``.
        labels: shape ``(N,)``; a class may have no row.
        num_classes: K.
        clusters: M, at most N.
        weights: of the losses.
        power: of :func:`~krdistill.dlsa.losses.likelihood_weights`.
        epochs, batch_size: passes over the rows, in an order drawn anew; as many pairs as rows in each step.
        lr: of Adam, falling to zero along a cosine.
        blocks, hidden, centre_std: of :class:`MixtureFlow`.
        decay: of :class:`~krdistill.dlsa.losses.RunningShares`.
        seed: of the weights, the order and the pairs.

    Returns:
        The flow, frozen, in the dtype of the features (float32 at least) and on their device; and ``{"epoch",
        "pure_clusters", "losses"}``, the losses one mapping per epoch.

    Raises:
        ArgumentError: arguments that do not fit, or features that are not finite.
        DataError: more clusters than rows, or a fit that diverged.
        MissingDependencyError: zuko is not installed.

    Source: Xu et al., ECCV 2022, arXiv 2208.02567.
    Deviation: Adam in place of SGD at 0.2, which batch normalisation between the blocks allows; the likelihood's weight
    goes with the width; 50 clusters where the authors have 500 for ten times the rows; and the bound on the largest
    cluster is relative, where the authors' is 5000 rows, about 20 times ImageNet-LT's mean.
    """
    K = check_integer("num_classes", num_classes, at_least=1)
    features, labels = check_rows(features, labels, K)
    M = check_integer("clusters", clusters, at_least=1)
    N = len(labels)
    if M > N:
        raise DataError(f"clusters: {M} clusters for {N} rows; give at most {N}, better a tenth of that.")
    factors = (weights or FlowWeights()).at(features.shape[1])
    epochs = check_integer("epochs", epochs, at_least=1)
    lr = check_number("lr", lr, above=0)
    steps = math.ceil(N / check_integer("batch_size", batch_size, at_least=1))
    flow = MixtureFlow(features.shape[1], M, blocks=blocks, hidden=hidden, centre_std=centre_std, seed=seed)
    flow = flow.to(features.dtype).to(features.device)
    flow.standardise(features)
    v = like(likelihood_weights(torch.bincount(labels, minlength=K).double().cpu(), power=power), features)
    optimizer = torch.optim.Adam(flow.parameters(), lr=lr)
    running = RunningShares(decay)
    history: list[dict[str, float]] = []
    best, kept, state = -1, 0, None
    for epoch in range(epochs):
        draws = generator(seed, "dlsa-rows", epoch)
        sums = {"likelihood": 0.0, "purity": 0.0, "balance": 0.0}
        for step, index in enumerate(torch.randperm(N, generator=draws).tensor_split(steps)):
            one, other = random_pairs(labels, len(index), draws)
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / epochs))
            with torch.enable_grad():
                joint = flow.log_joint(features[torch.cat([index, one, other]).to(features.device)])
                log_r = joint.log_softmax(1)
                own = len(index)
                loss = {
                    "likelihood": likelihood_loss(joint[:own].logsumexp(1), labels[index.to(labels.device)], v),
                    "balance": balance_loss(running.update(log_r[:own])),
                }
                if len(one):
                    loss["purity"] = purity_loss(log_r[own : own + len(one)], log_r[own + len(one) :])
                total = torch.stack([factors[name] * value for name, value in loss.items()]).sum()
                optimizer.zero_grad()
                total.backward()
            optimizer.step()
            for name, value in loss.items():
                sums[name] += float(value.detach()) / steps
        if not all(math.isfinite(value) for value in sums.values()):
            raise DataError(f"features: the flow diverged in epoch {epoch + 1} with lr={lr:g}. Take a lower one.")
        history.append(sums)
        counts = cluster_counts(assign(flow, features)[1], labels, M, K).cpu()
        if int(counts.sum(1).max()) <= max(_LARGEST * N / M, 1) and pure_clusters(counts) >= best:
            best, kept, state = pure_clusters(counts), epoch, copy.deepcopy(flow.state_dict())
    if state is not None:
        flow.load_state_dict(state)
    flow.requires_grad_(False)
    return flow, {"epoch": (kept if state else epochs - 1) + 1, "pure_clusters": max(best, 0), "losses": history}


@torch.no_grad()
def assign(flow: MixtureFlow, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log density ``(N,)``, likeliest cluster ``(N,)`` and latent u ``(N, D)`` of rows ``(N, D)``."""
    parts: list[Sequence[Tensor]] = []
    for rows in features.split(_CHUNK):
        u, joint = flow.place(rows)
        parts.append((joint.logsumexp(1), joint.argmax(1), u))
    density, cluster, latent = (torch.cat(part) for part in zip(*parts, strict=True))
    return density, cluster, latent


def check_rows(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Features, float32 at least and without a graph, and labels on their device; at least one row."""
    check_finite("features", check_matrix("features", features, "(N, D)"))
    if 0 in features.shape:
        raise ArgumentError(f"features: expected at least one row and column, but got shape {tuple(features.shape)}.")
    labels = check_labels(labels, features.shape[0], num_classes).to(features.device)
    return at_least_float32(features.detach()), labels
