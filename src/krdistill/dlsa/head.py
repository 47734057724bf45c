"""The classifier of DLSA: rows are divided by how likely they are, and each part has a classifier of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_integer, check_matrix, check_number, like
from ..errors import ArgumentError, DataError
from ..rectify.classifier_refit import checked_weight_decay, refit_classifier
from ..rng import derive_seed
from .clusters import class_distributions, cluster_counts, others_distributions, size_entropy
from .flow import MixtureFlow, assign, check_rows, fit_flow


class Level(nn.Module):
    """One division: a flow, how likely a row must be to stay here, and the classifier of those that stay.

    Args:
        flow: fitted.
        threshold: of log p(x); rows at least as likely stay.
        distributions: P, the class distribution of every cluster, shape ``(M, K)``.
        classifier: linear, from ``[x; u; P of the row's cluster]`` to K logits.
    """

    threshold: Tensor
    distributions: Tensor

    def __init__(self, flow: MixtureFlow, threshold: Tensor, distributions: Tensor, classifier: nn.Linear) -> None:
        super().__init__()
        self.flow = flow
        self.register_buffer("threshold", threshold)
        self.register_buffer("distributions", distributions)
        self.classifier = classifier

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(N, K)`` and whether each row stays, bool ``(N,)``."""
        u, joint = self.flow.place(features)
        known = torch.cat([features, u, self.distributions[joint.argmax(1)]], 1)
        return self.classifier(known), joint.logsumexp(1) >= self.threshold


class DLSAHead(nn.Module):
    r"""From frozen features to logits free of the class prior, by dividing the rows level after level.

    At a level the rows that its flow finds likely, :math:`\log p(x) \ge t`, are classified with what their cluster
    tells: :math:`z = W_1 x + W_2 [u; P_{c(x)}]`, with c(x) the likeliest cluster and P its class distribution in
    training. The rest goes to the next level, and what is left after the last to a plain linear classifier.

    Args:
        levels: in their order; none leaves the plain classifier alone.
        rest: linear, D to K.
    """

    def __init__(self, levels: Sequence[Level], rest: nn.Linear) -> None:
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.rest = rest

    @property
    def depth(self) -> int:
        return len(self.levels)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``(N, K)`` of features ``(N, D)``, in the dtype of the head."""
        return self._answer(features)[0]

    @torch.no_grad()
    def route(self, features: Tensor) -> Tensor:
        """At which level each row is classified, int64 ``(N,)``; :attr:`depth` for the rest."""
        return self._answer(features)[1]

    def _answer(self, features: Tensor) -> tuple[Tensor, Tensor]:
        check_matrix("features", features, "(N, D)", columns=self.rest.in_features)
        x = like(features, self.rest.weight)
        logits = self.rest(x)
        place = torch.full((len(x),), self.depth, dtype=torch.int64, device=x.device)
        # From the last level to the first: an earlier one has the last word.
        for i in reversed(range(self.depth)):
            own, stays = self.levels[i](x)
            logits = torch.where(stays.unsqueeze(1), own, logits)
            place = torch.where(stays, i, place)
        return logits, place


def fit_dlsa(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    depth: int = 1,
    held_out: tuple[Tensor, Tensor] | None = None,
    share: float = 0.3,
    outside: float = 1.0,
    weight_decay: float | None = None,
    max_steps: int = 200,
    clusters: int = 50,
    seed: int = 0,
    **flow: Any,
) -> tuple[DLSAHead, dict[str, Any]]:
    """Fits a :class:`DLSAHead`.

    Each level's flow is fitted to the rows that the levels before left over; its threshold lets the ``share`` of them
    pass that it finds the likeliest. Classifiers are fitted with balanced softmax
    (:func:`~krdistill.rectify.classifier_refit.refit_classifier`), on x, u and P scaled to the same mean square.

    Args:
        features: of the training images, shape ``(N, D)``.
        labels: shape ``(N,)``.
        num_classes: K; every class needs a row.
        depth: levels, >= 0, at most; dividing ends where fewer rows are left than there are clusters.
        held_out: features and labels of images that were not trained on. With them the depth is chosen, from 0 to
            ``depth``, by balanced accuracy (the mean over the classes that have a row here); of equals the smallest.
        share: of a level's rows that stay there, in (0, 1).
        outside: what a training row of elsewhere counts in a level's classifier, in [0, 1]. The flow knows its training
            rows better than new ones, so new rows of a rare class go other ways; 0 as the authors.
        weight_decay, max_steps: of the classifiers; by default as there.
        clusters: M, at most N.
        seed: of the flows.
        flow: the other arguments of :func:`~krdistill.dlsa.flow.fit_flow`.

    Returns:
        The head, frozen, in the dtype of the features (float32 at least) and on their device; and, for the record,
        ``{"depth", "held_out", "levels"}``: the balanced accuracy of each depth on held-out rows, where there are
        some, and of each level ``rows``, ``passed``, ``size_entropy`` of its clusters and what ``fit_flow`` says.

    Raises:
        ArgumentError: arguments that do not fit, or features that are not finite.
        DataError: a class without a row, more clusters than rows, or a fit that diverged.
        MissingDependencyError: zuko is not installed.

    Source: Xu et al., "Constructing Balance from Imbalance for Long-tailed Image Recognition", ECCV 2022,
    arXiv 2208.02567.
    Deviation: in training a row's P leaves the row itself out, for otherwise a rare class's rows recognise themselves
    in it; the depth is chosen on held-out rows, where the authors' code looks at the test set; classifiers are fitted
    to their optimum, under the prior of all rows and with ``outside``, where the authors train by SGD on a level's
    rows; and those of :func:`~krdistill.dlsa.flow.fit_flow`.
    """
    K = check_integer("num_classes", num_classes, at_least=2)
    features, labels = check_rows(features, labels, K)
    depth = check_integer("depth", depth, at_least=0)
    share = check_number("share", share, above=0, below=1)
    outside = check_number("outside", outside, at_least=0, at_most=1)
    M = check_integer("clusters", clusters, at_least=1)
    if depth and len(labels) < M:
        raise DataError(f"clusters: {M} clusters for {len(labels)} rows; give at most {len(labels)}.")
    judged = None if held_out is None else _check_held_out(held_out, features, K)

    def classifier(blocks: Sequence[Tensor], here: Tensor) -> nn.Linear:
        weights = torch.where(here.cpu(), 1.0, outside).double()
        return _fit_classifier(blocks, labels, K, weights, weight_decay=weight_decay, max_steps=max_steps)

    left = torch.ones_like(labels, dtype=torch.bool)
    plain = classifier([features], left)
    levels: list[Level] = []
    heads = [DLSAHead([], plain)]
    record: list[dict[str, Any]] = []
    for i in range(depth):
        rows = left.nonzero().flatten()
        if len(rows) < max(M, 2):
            break
        own_seed = derive_seed(seed, "dlsa-level", i)
        fitted, found = fit_flow(features[rows], labels[rows], K, clusters=M, seed=own_seed, **flow)
        density, cluster, latent = assign(fitted, features)
        threshold = like(torch.quantile(density[rows].cpu().double(), 1 - share), density)
        rows, own, of = rows.cpu(), labels.cpu(), cluster.cpu()
        counts = cluster_counts(of[rows], own[rows], M, K)
        P = class_distributions(counts)
        others = P[of]
        others[rows] = others_distributions(counts, of[rows], own[rows])
        here = left & (density >= threshold)
        classify = classifier([features, latent, like(others, features)], here)
        levels.append(Level(fitted, threshold, like(P, features), classify))
        left = left & ~here
        entropy = size_entropy(counts.sum(1))
        record.append({"rows": len(rows), "passed": int(here.sum()), "size_entropy": entropy, **found})
        if judged is None and i + 1 < depth and int(left.sum()) >= max(M, 2):
            continue  # its plain classifier would not be used
        # Where rows of elsewhere count as much, all plain classifiers are the same.
        heads.append(DLSAHead(levels, plain if outside == 1 else classifier([features], left)))
    chosen, made = heads[-1], {}
    if judged is not None:
        accuracies = [balanced_accuracy(head(judged[0]), judged[1]) for head in heads]
        chosen = heads[accuracies.index(max(accuracies))]
        made = {"held_out": accuracies}
    return chosen.requires_grad_(False).eval(), {"depth": chosen.depth, **made, "levels": record}


def balanced_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The mean of the classes' accuracies, over the classes that have a row."""
    K, logits, labels = logits.shape[1], logits.cpu(), labels.cpu()
    number = torch.bincount(labels, minlength=K)
    right = torch.bincount(labels[logits.argmax(1) == labels], minlength=K)
    return float((right[number > 0].double() / number[number > 0]).mean())


def _fit_classifier(
    blocks: Sequence[Tensor],
    labels: Tensor,
    num_classes: int,
    row_weights: Tensor,
    *,
    weight_decay: float | None,
    max_steps: int,
) -> nn.Linear:
    """A balanced linear classifier on blocks of columns, which the penalty meets at the same scale."""
    wide = [block.cpu().double() for block in blocks]
    scales = [float(block.square().sum(1).mean().sqrt()) or 1.0 for block in wide]
    scaled = torch.cat([block / scale for block, scale in zip(wide, scales, strict=True)], 1)
    if not bool(row_weights.any()):
        row_weights = torch.ones_like(row_weights)  # nobody is left: what classifies them is never asked in training
    # Its penalty is on the scale of all columns together; so that of x is the same, however many blocks there are.
    weight_decay = checked_weight_decay(weight_decay, num_classes) / len(blocks)
    weight, bias = refit_classifier(
        scaled, labels, num_classes, weight_decay=weight_decay, max_steps=max_steps, row_weights=row_weights
    )
    columns = torch.cat([torch.full((b.shape[1],), 1 / s) for b, s in zip(blocks, scales, strict=True)])
    linear = nn.utils.skip_init(nn.Linear, scaled.shape[1], num_classes, dtype=blocks[0].dtype, device=labels.device)
    with torch.no_grad():
        linear.weight.copy_(weight * columns)
        linear.bias.copy_(bias)
    return linear


def _check_held_out(held_out: Any, features: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    if not isinstance(held_out, tuple | list) or len(held_out) != 2:
        raise ArgumentError(f"held_out: expected (features, labels), but got {type(held_out).__name__}.")
    check_matrix("held_out features", held_out[0], "(N, D)", columns=features.shape[1])
    x, y = check_rows(at_least_float32(held_out[0]), held_out[1], num_classes)
    return like(x, features), y.to(features.device)
