"""Whom a teacher favours, before and after its predictions are rectified."""

from __future__ import annotations

from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor

from .._checks import check_labels, describe
from ..errors import ArgumentError
from ..priors import ClassGroups, ClassPrior
from .metrics import chunks, evaluate_predictions

FAIR = (0.9, 1.1)  # a group whose share of the probability lies in here is called fairly treated
RARE = 0.01  # an error rate below this is called "almost never"


def diagnose_teacher(
    logits: Tensor,
    labels: Tensor,
    prior: ClassPrior,
    groups: ClassGroups,
    *,
    rectified_logits: Tensor | None = None,
    train_predictions: Tensor | None = None,
    train_labels: Tensor | None = None,
) -> dict[str, Any]:
    r"""Measures how a teacher spreads its probability over the classes.

    Every class of the evaluated images counts the same, however many images it has. With P the classes that have images
    and p_i the softmax of image i at T = 1, the mean prediction is

    .. math:: m = \frac{1}{|P|} \sum_{c \in P} \frac{1}{n_c} \sum_{i : y_i = c} p_i

    and a teacher that favours nobody has m_k = 1/|P| for every class of P, its *fair share*.

    Args:
        logits: the teacher's, on images it was not trained on, shape ``(N, K)``.
        labels: their classes, shape ``(N,)``, integers in [0, K).
        prior: the class prior of the training images.
        groups: the groups of classes.
        rectified_logits: the same images' rectified logits, shape ``(N, K)``.
        train_predictions: the teacher's plain :func:`predictions` on its own training images, shape ``(M,)``.
        train_labels: their classes, shape ``(M,)``.

    Returns:
        Plain data. ``before`` is the teacher as it is, ``after`` is rectified (None without ``rectified_logits``); both
        hold

        - ``mean_prediction``: m, K values that sum to 1;
        - ``ratio``: m over the fair share, K values; 1 is fair, None for a class without evaluated images;
        - ``prior_correlation``: Spearman's rank correlation of m with the training counts over P (the same for their
          logarithms); 1: the more images, the more probability. None where it is not defined (all counts equal, or
          fewer than three classes);
        - ``total_variation``: half the sum of |m - fair share|, the probability that would have to move to be fair;
        - ``top1``, ``balanced_accuracy``, ``ece``: as :func:`~krdistill.evaluation.evaluate_predictions`;
        - ``groups``: name to ``classes``, evaluated ``images``, ``accuracy``, ``ece``, ``mass`` (the group's part of
          m), ``fair_share`` (its part of P), ``ratio`` = mass / fair_share, ``entropy`` (of its images' soft targets
          at T = 1, in nats, mean over its classes; log K is a target that says nothing). None without images.

        ``classes`` K and ``images`` N; ``training``: ``{"images", "error", "groups"}``, the share of the teacher's own
        training images that its plain prediction gets wrong, over all images and by group (mean over classes), which is
        how often error correction of plain logits fires; None without ``train_predictions``. ``verdict``: the same in
        sentences.

    Raises:
        ArgumentError: shapes that do not fit, no images, labels out of range, logits that are not finite, only one of
            ``train_predictions`` and ``train_labels``.
    """
    if (train_predictions is None) != (train_labels is None):
        raise ArgumentError("Expected train_predictions and train_labels together, got one of them.")
    if rectified_logits is not None and rectified_logits.shape != logits.shape:
        raise ArgumentError(
            f"Expected rectified logits of the same images, shape {tuple(logits.shape)}, got "
            f"{tuple(rectified_logits.shape)}."
        )
    before = _view(logits, labels, prior, groups)
    after = None if rectified_logits is None else _view(rectified_logits, labels, prior, groups)
    training = None
    if train_predictions is not None and train_labels is not None:
        training = _training(train_predictions, train_labels, groups)
    return {
        "classes": logits.shape[1],
        "images": len(labels),
        "before": before,
        "after": after,
        "training": training,
        "verdict": _verdict(before, after, training),
    }


def _view(logits: Tensor, labels: Tensor, prior: ClassPrior, groups: ClassGroups) -> dict[str, Any]:
    scores = evaluate_predictions(logits, labels, groups, class_names=prior.class_names)
    K = logits.shape[1]
    images = torch.bincount(labels.cpu().long(), minlength=K)
    present = images > 0
    fair = present.double() / present.sum()
    mean = torch.zeros(K, dtype=torch.float64)
    entropy = torch.zeros(K, dtype=torch.float64)  # mean over the class's images
    for z, y in chunks(logits, labels):
        log_p = z.log_softmax(1)
        p = log_p.exp()
        weight = 1.0 / images[y].double()
        mean += weight @ p
        entropy.index_add_(0, y, weight * -(p * log_p).sum(1))
    mean /= present.sum()
    group_of = groups.index
    by_group = {}
    for g, (name, row) in enumerate(scores["groups"].items()):
        member = group_of == g
        seen = member & present
        mass, share = float(mean[member].sum()), float(fair[member].sum())
        known = bool(seen.any())
        by_group[name] = {
            **row,
            "mass": mass if known else None,
            "fair_share": share if known else None,
            "ratio": mass / share if known else None,
            "entropy": float(entropy[seen].mean()) if known else None,
        }
    ratio = mean * present.sum()
    return {
        "mean_prediction": mean.tolist(),
        "ratio": [r if seen else None for r, seen in zip(ratio.tolist(), present.tolist(), strict=True)],
        "prior_correlation": _rank_correlation(mean[present], prior.counts[present]),
        "total_variation": float((mean - fair).abs().sum() / 2),
        "top1": scores["top1"],
        "balanced_accuracy": scores["balanced_accuracy"],
        "ece": scores["ece"],
        "groups": by_group,
    }


def predictions(logits: Tensor) -> Tensor:
    """The class of the largest logit, ``(N,)``, int64; -1 where a row ``(K,)`` is not finite, as a broken network's."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def _training(predicted: Tensor, labels: Tensor, groups: ClassGroups) -> dict[str, Any]:
    K = len(groups.index)
    if not isinstance(predicted, Tensor) or predicted.shape != labels.shape or predicted.is_floating_point():
        raise ArgumentError(
            f"train_predictions: expected an integer tensor of the shape of train_labels, {tuple(labels.shape)}, "
            f"but got {describe(predicted)}."
        )
    predicted, labels = predicted.cpu(), check_labels(labels.cpu(), len(labels), K)
    if not len(labels):
        raise ArgumentError("Expected at least one training image, got none. Is this part of the data empty?")
    broken = (predicted < 0).nonzero().flatten()
    if len(broken):
        raise ArgumentError(
            f"train_predictions: {len(broken)} of {len(labels)} are of logits that hold NaN or infinity (the first is "
            f"row {int(broken[0])}). The network diverged, or its input is broken."
        )
    wrong = (predicted != labels).double()
    rates = torch.bincount(labels, weights=wrong, minlength=K) / torch.bincount(labels, minlength=K)
    return {"images": len(labels), "error": float(wrong.mean()), "groups": groups.mean_over(rates)}


def _rank_correlation(a: Tensor, b: Tensor) -> float | None:
    if len(a) < 3 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


# The verdict ----------------------------------------------------------------------------------------------------------


def _words(group: str) -> str:
    return f"{group}-shot classes" if group in {"many", "few"} else f"{group} classes"


def _verdict(before: dict[str, Any], after: dict[str, Any] | None, training: dict[str, Any] | None) -> list[str]:
    """Sentences a person can act on; every number in them stands in the record too."""
    known = {name: g for name, g in before["groups"].items() if g["ratio"] is not None}
    low = min(known, key=lambda n: known[n]["ratio"])
    high = max(known, key=lambda n: known[n]["ratio"])
    lines = []
    if len(known) > 1:
        a, b = known[low]["ratio"], known[high]["ratio"]
        if a >= FAIR[0] and b <= FAIR[1]:
            text = f"The teacher treats the groups alike: each gets {a:.2f} to {b:.2f} of its fair share of probability"
        else:
            text = (
                f"The teacher gives {_words(low)} {a:.2f} of their fair share of probability and {_words(high)} {b:.2f}"
            )
        if after:
            c, d = after["groups"][low]["ratio"], after["groups"][high]["ratio"]
            text += f"; rectified {c:.2f} and {d:.2f}" if low != high else f"; rectified {c:.2f}"
            if (a < FAIR[0] and c > FAIR[1]) or (b > FAIR[1] and d < FAIR[0]):
                text += ", which overshoots"
        lines.append(f"{text}.")
    rho = before["prior_correlation"]
    if rho is not None:
        how = "follows" if rho >= 0.5 else "runs against" if rho <= -0.5 else "hardly follows"
        text = f"Class by class, its mean prediction {how} the training counts (rank correlation {rho:.2f}"
        later = after and after["prior_correlation"]
        lines.append(text + (f"; rectified {later:.2f})." if later is not None and after else ")."))
    if after:
        v, w = before["total_variation"], after["total_variation"]
        text = f"To be fair to every class, {v:.1%} of its probability would have to move; rectified {w:.1%}"
        lines.append(text + (": rectification makes it less even." if w > v else "."))
        x, y = before["balanced_accuracy"], after["balanced_accuracy"]
        text = f"Rectified, its class-balanced accuracy goes from {x:.1%} to {y:.1%}"
        if len(known) > 1:
            x, y = known[low]["accuracy"], after["groups"][low]["accuracy"]
            text += f", on {_words(low)} from {x:.1%} to {y:.1%}"
        lines.append(f"{text}.")
    if training:
        rates = {name: rate for name, rate in training["groups"].items() if rate is not None}
        parts = ", ".join(f"{name} {rate:.1%}" for name, rate in rates.items())
        if max(rates.values()) < RARE:
            lines.append(
                f"It is almost never wrong on its own training data ({parts}), so correcting the errors of its plain "
                "logits would hardly ever do anything."
            )
        else:
            lines.append(
                f"On its own training data it is wrong on {parts}: that is how often correcting the errors of its "
                "plain logits would fire."
            )
    return lines
