"""What a set of predictions is worth: accuracy by class and by group, calibration, confusion.

Every number is a plain Python float, or None where there is nothing to measure, so a result goes to JSON as it is.
Accuracies and calibration errors are fractions in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._checks import check_integer, check_labels, check_logits
from .._torchvision import prepare_for_torchvision
from ..errors import ArgumentError
from ..priors import ClassGroups

CHUNK_VALUES = 4_000_000  # logits in work at once: 32 MB of float64


class PerImage(NamedTuple):
    """What the logits say of each image; all of shape ``(N,)``, on the CPU.

    Attributes:
        prediction: the class with the largest logit (the first of equals), int64.
        confidence: its softmax probability, float64.
        rank: how many classes stand before the true one (larger logit, or equal and earlier), int64; 0 is correct.
        nll: minus the log-probability of the true class, float64.
    """

    prediction: Tensor
    confidence: Tensor
    rank: Tensor
    nll: Tensor


def evaluate_predictions(
    logits: Tensor, labels: Tensor, groups: ClassGroups, *, class_names: Sequence[str], ece_bins: int = 15
) -> dict[str, Any]:
    r"""Metrics of one network on one set of images.

    With a_k the accuracy on the images of class k, and P the classes that have images in this set:

    .. math:: \text{balanced} = \frac{1}{|P|} \sum_{k \in P} a_k, \qquad
        \text{harmonic} = \frac{|P|}{\sum_{k \in P} 1 / a_k}, \qquad
        \text{ECE} = \sum_b \frac{|B_b|}{N} \, |\text{acc}(B_b) - \text{conf}(B_b)|

    A group's accuracy is the mean of its classes' accuracies (the mean over its images too, where every class has
    equally many). A class without images is None in ``per_class`` and left out of every mean, never 0; a group without
    images is None.

    Args:
        logits: shape ``(N, K)``, floating point, finite. Equal logits count in class order, as ``argmax`` does.
        labels: shape ``(N,)``, integers in [0, K).
        groups: the groups of classes.
        class_names: K names.
        ece_bins: equal-width confidence bins of the calibration error.

    Returns:
        ``images`` N, ``top1``, ``top5`` (None where K <= 5), ``balanced_accuracy``, ``harmonic_mean`` (0 where a class
        is never right), ``worst_class`` ``{"name", "accuracy", "classes"}`` (the first of the ``classes`` that share
        the lowest accuracy), ``ece``, ``nll`` (nats), ``groups`` name to ``{"classes", "images", "accuracy", "ece"}``,
        ``per_class`` K accuracies, ``group_confusion`` true group to predicted group to the share of its images (mean
        over its classes; None for a group without images).

    Raises:
        ArgumentError: shapes or types that do not fit, no images, labels out of range, logits that are not finite.

    Source: ECE of Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv 1706.04599, by torchmetrics.
    Deviation: a confidence that rounds to exactly 1 stays in the last bin, where torchmetrics opens one more.
    """
    labels = check_predictions(logits, labels)
    K = logits.shape[1]
    if len(class_names) != K or groups.index.shape != (K,):
        raise ArgumentError(
            f"Expected names and groups of {K} classes, as the logits have, got {len(class_names)} names and groups of "
            f"{groups.index.numel()} classes."
        )
    check_integer("ece_bins", ece_bins, at_least=1)
    each = per_image(logits, labels)
    group_of = groups.index
    correct = each.rank == 0
    images = torch.bincount(labels, minlength=K)
    present = images > 0
    accuracy = torch.bincount(labels, weights=correct.double(), minlength=K) / images  # NaN for an absent class
    shown = accuracy[present]
    worst = int(torch.where(present, accuracy, torch.inf).argmin())

    # Each class counts the same in its group's row: an image weighs 1 / (images of its class).
    G = len(groups.names)
    cell = group_of[labels] * G + group_of[each.prediction]
    confusion = torch.bincount(cell, weights=1.0 / images[labels].double(), minlength=G * G).reshape(G, G)
    means = groups.mean_over(accuracy)
    by_group, rows = {}, {}
    for g, name in enumerate(groups.names):
        member = group_of == g
        seen, mine = member & present, member[labels]
        count = int(seen.sum())
        by_group[name] = {
            "classes": int(member.sum()),
            "images": int(mine.sum()),
            "accuracy": means[name],
            "ece": _ece(each.confidence[mine], correct[mine], ece_bins) if count else None,
        }
        rows[name] = dict(zip(groups.names, (confusion[g] / count).tolist() if count else [None] * G, strict=True))
    return {
        "images": len(labels),
        "top1": float(correct.double().mean()),
        "top5": float((each.rank < 5).double().mean()) if K > 5 else None,
        "balanced_accuracy": float(shown.mean()),
        "harmonic_mean": float(1.0 / (1.0 / shown).mean()),
        "worst_class": {
            "name": str(class_names[worst]),
            "accuracy": float(accuracy[worst]),
            "classes": int((shown == accuracy[worst]).sum()),
        },
        "ece": _ece(each.confidence, correct, ece_bins),
        "nll": float(each.nll.mean()),
        "groups": by_group,
        "per_class": [a if seen else None for a, seen in zip(accuracy.tolist(), present.tolist(), strict=True)],
        "group_confusion": rows,
    }


def per_image(logits: Tensor, labels: Tensor) -> PerImage:
    """Prediction, confidence, rank of the truth and negative log-likelihood of each image, a chunk at a time.

    Args:
        logits: shape ``(N, K)``, floating point, finite.
        labels: shape ``(N,)``, integers in [0, K).

    Raises:
        ArgumentError: as :func:`evaluate_predictions`.
    """
    labels = check_predictions(logits, labels)
    parts = []
    order = torch.arange(logits.shape[1])
    for z, y in chunks(logits, labels):
        log_p = z.log_softmax(1)
        truth = z.gather(1, y[:, None])
        rank = ((z > truth) | ((z == truth) & (order < y[:, None]))).sum(1)
        prediction = z.argmax(1)
        confidence = log_p.gather(1, prediction[:, None]).exp().squeeze(1).clamp(max=1.0)
        parts.append((prediction, confidence, rank, -log_p.gather(1, y[:, None]).squeeze(1)))
    return PerImage(*(torch.cat(column) for column in zip(*parts, strict=True)))


def chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Float64 logits and int64 labels on the CPU, few enough rows at a time that a large K needs no large memory."""
    rows = max(1, CHUNK_VALUES // logits.shape[1])
    for z, y in zip(logits.detach().split(rows), labels.split(rows), strict=True):
        yield z.cpu().double(), y.cpu().long()


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Images by true and predicted class.

    Args:
        predictions: predicted classes, shape ``(N,)``, integers in [0, K).
        labels: true classes, shape ``(N,)``, integers in [0, K).
        num_classes: K.

    Returns:
        Counts, shape ``(K, K)``, int64; rows are the truth.

    Raises:
        ArgumentError: shapes that differ, values that are no integers or out of range.
    """
    labels = check_labels(labels.cpu(), labels.numel(), num_classes)
    if predictions.shape != labels.shape:
        raise ArgumentError(f"Expected {len(labels)} predictions, one per label, got {tuple(predictions.shape)}.")
    predictions = check_labels(predictions.cpu(), len(labels), num_classes)
    cell = labels * num_classes + predictions
    return torch.bincount(cell, minlength=num_classes**2).reshape(num_classes, num_classes)


def prediction_record(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """What is kept of a network's answer to each image.

    Args:
        logits: shape ``(N, K)``, floating point, finite.
        labels: shape ``(N,)``, integers in [0, K).

    Returns:
        Arrays of shape ``(N,)``: ``prediction`` int32, its ``confidence`` float32, and ``rank`` int32, how many classes
        stand before the true one (0 is correct, below 5 is correct in the top five).

    Raises:
        ArgumentError: as :func:`evaluate_predictions`.
    """
    each = per_image(logits, labels)
    return {
        "prediction": each.prediction.numpy().astype(np.int32),
        "confidence": each.confidence.numpy().astype(np.float32),
        "rank": each.rank.numpy().astype(np.int32),
    }


def reliability_curve(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> dict[str, list[Any]]:
    """Accuracy against confidence, in equal-width bins of confidence (each holds its lower edge; the last both).

    Args:
        confidence: probability of the predicted class, shape ``(N,)``, in [0, 1].
        correct: whether the prediction was right, shape ``(N,)``.
        bins: number of bins.

    Returns:
        Lists of ``bins`` values: ``center`` of the bin, mean ``accuracy`` and ``confidence`` of its images (None for an
        empty bin) and ``count``. The ECE is the mean over images of ``|accuracy - confidence|``.

    Raises:
        ArgumentError: shapes that differ, confidences outside [0, 1], no bin.
    """
    c, r = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    bins = check_integer("bins", bins, at_least=1)
    if c.ndim != 1 or c.shape != r.shape:
        raise ArgumentError(f"Expected confidence and correct of one shape (N,), got {c.shape} and {r.shape}.")
    if not ((c >= 0) & (c <= 1)).all():
        raise ArgumentError(f"Expected confidences in [0, 1], got {c.min():g} to {c.max():g}. Pass probabilities.")
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, c, side="right") - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    means = [np.bincount(index, weights=v, minlength=bins) / np.maximum(count, 1) for v in (r, c)]
    return {
        "center": ((edges[:-1] + edges[1:]) / 2).tolist(),
        "accuracy": [v if n else None for v, n in zip(means[0].tolist(), count, strict=True)],
        "confidence": [v if n else None for v, n in zip(means[1].tolist(), count, strict=True)],
        "count": count.tolist(),
    }


def _ece(confidence: Tensor, correct: Tensor, bins: int) -> float:
    """Top-label calibration error: the binary one of "the prediction is right" at its confidence."""
    below_one = confidence.clamp(max=1.0 - 2.0**-53)
    prepare_for_torchvision()
    from torchmetrics.functional.classification import binary_calibration_error

    return float(binary_calibration_error(below_one, correct.long(), n_bins=bins, norm="l1", validate_args=False))


def check_predictions(logits: Tensor, labels: Tensor, what: str = "") -> Tensor:
    """The labels as int64 on the CPU, after a look at what cannot be evaluated; ``what`` names the images."""
    check_logits(f"{what}logits", logits)
    labels = check_labels(labels.cpu(), *logits.shape)
    if not len(labels):
        raise ArgumentError(f"Expected at least one {what}image to evaluate, got none. Is this part of the data empty?")
    bad = ~logits.isfinite().all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ArgumentError(
            f"{int(bad.sum())} of {len(bad)} rows of the {what}logits hold NaN or infinity (the first is row {first}). "
            "The network diverged, or its input is broken."
        )
    return labels
