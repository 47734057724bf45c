"""Second stages: the representation is learned, the classifier on it is balanced afterwards.

They work on stored features ``(N, D)`` and the last linear layer's weight ``(K, D)`` and bias ``(K,)``; nothing else of
the network is needed. Each gives what can be put into a :class:`torch.nn.Linear`, and :func:`apply_second_stage` does
that.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020,
arXiv 1910.09217; ``balanced-softmax`` is ours, with the loss of Ren et al., NeurIPS 2020, arXiv 2007.10740.
Deviation: features are computed once, on images as they are, where the paper augments the images of its second stage
anew; and an epoch is N draws (see :mod:`krdistill.sampling`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import (
    at_least_float32,
    check_choice,
    check_finite,
    check_integer,
    check_labels,
    check_matrix,
    check_number,
    check_per_class,
    like,
)
from ..errors import ArgumentError, DataError, ModelError
from ..sampling import class_balanced_order
from .anchor_rectification import class_means
from .classifier_refit import refit_classifier

Method = Literal["balanced-softmax", "crt", "tau-norm", "lws", "ncm"]

METHODS = ("balanced-softmax", "crt", "tau-norm", "lws", "ncm")
TAUS = tuple(step / 10 for step in range(21))

_CHUNK_VALUES = 4_000_000  # logits in work at once


def crt(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    bias: bool = True,
    epochs: int = 10,
    lr: float = 0.2,
    batch_size: int = 512,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Classifier re-training: a new linear classifier, fitted by cross-entropy with class-balanced sampling.

    SGD with momentum, the learning rate falling to zero along a cosine.

    Args:
        features: the training images', shape ``(N, D)``.
        labels: shape ``(N,)``.
        num_classes: K; every class needs a row.
        bias: false leaves the bias at zero.
        epochs: passes of N draws.
        lr: learning rate at the start.
        batch_size: rows per step; the batches' sizes differ by one at most.
        momentum: in [0, 1).
        weight_decay: L2 penalty, >= 0.
        seed: of the order of the rows.

    Returns:
        Weight ``(K, D)`` and bias ``(K,)``, on the device of ``features``; float32, or float64 where the features are.

    Raises:
        ArgumentError: arguments that do not fit, or features that are not finite.
        DataError: a class without a row, or a fit that diverged.

    Source: Kang et al., ICLR 2020, arXiv 1910.09217 (cRT); the defaults are the authors'.
    Deviation: the classifier starts at zero rather than at random: the problem is convex.
    """
    K = check_integer("num_classes", num_classes, at_least=2)
    features, labels = _check_samples(features, labels, K, every_class=True)
    weight = features.new_zeros(K, features.shape[1], requires_grad=True)
    offset = features.new_zeros(K, requires_grad=bias)
    _fit(
        lambda f: F.linear(f, weight, offset),
        [weight, offset] if bias else [weight],
        features,
        labels,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=seed,
    )
    return weight.detach(), offset.detach()


def lws(
    weight: Tensor,
    bias: Tensor | None,
    features: Tensor,
    labels: Tensor,
    *,
    epochs: int = 5,
    lr: float = 0.2,
    batch_size: int = 512,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
) -> Tensor:
    r"""Learnable weight scaling: one factor per class on a classifier that is kept, with class-balanced sampling.

    .. math:: z_k = s_k \, (w_k^\top f + b_k)

    Args:
        weight: the classifier's, shape ``(K, D)``.
        bias: its bias, shape ``(K,)``, or None.
        features, labels: as in :func:`crt`.
        epochs, lr, batch_size, momentum, weight_decay, seed: as in :func:`crt`.

    Returns:
        Scales s ``(K,)``, started at 1, on the device of ``features``; multiply weight and bias with them. float32, or
        float64 where the features are.

    Raises:
        ArgumentError: arguments that do not fit, or features that are not finite.
        DataError: a class without a row, or a fit that diverged.

    Source: Kang et al., ICLR 2020, arXiv 1910.09217 (LWS); the defaults are the authors'.
    """
    check_finite("weight", check_matrix("weight", weight, "(K, D)"))
    K = weight.shape[0]
    features, labels = _check_samples(features, labels, K, width=weight.shape[1], every_class=True)
    if bias is not None:
        bias = like(check_per_class("bias", bias.detach() if isinstance(bias, Tensor) else bias, K), features)
    frozen = like(weight.detach(), features)
    scales = torch.ones_like(frozen[:, 0]).requires_grad_()
    _fit(
        lambda f: scales * F.linear(f, frozen, bias),
        [scales],
        features,
        labels,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        momentum=momentum,
        weight_decay=weight_decay,
        seed=seed,
    )
    return scales.detach()


def tau_norm(weight: Tensor, tau: float) -> Tensor:
    r"""Tau-normalisation: the classifier's rows made more equal in length; to be used without a bias.

    .. math:: \tilde w_k = \frac{w_k}{\|w_k\|^\tau}

    Args:
        weight: shape ``(K, D)``.
        tau: >= 0; 0 gives the weight back, 1 gives unit rows. See :func:`choose_tau`.

    Returns:
        Shape ``(K, D)``, on the device of ``weight``; float32, or float64 where the weight is. A zero row stays zero.

    Raises:
        ArgumentError: a weight that is no finite matrix, or a negative tau.

    Source: Kang et al., ICLR 2020, arXiv 1910.09217.
    """
    check_finite("weight", check_matrix("weight", weight, "(K, D)"))
    tau = check_number("tau", tau, at_least=0)
    w = at_least_float32(weight.detach())
    return w * _row_factors(w, tau).unsqueeze(1)


def choose_tau(weight: Tensor, features: Tensor, labels: Tensor, *, taus: Sequence[float] = TAUS) -> float:
    """The tau of :func:`tau_norm` with the best balanced accuracy.

    Args:
        weight: the classifier's, shape ``(K, D)``.
        features: of held-out images, shape ``(N, D)``: on its own training images a network is right as it is.
        labels: shape ``(N,)``. Balanced accuracy is the mean over the classes that have a row here.
        taus: what to try, each >= 0; by default 0, 0.1, ... 2.

    Returns:
        The best of ``taus``; of equals the smallest.

    Raises:
        ArgumentError: arguments that do not fit, or nothing to try.
        DataError: no row.

    Source: Kang et al., ICLR 2020, arXiv 1910.09217.
    """
    check_finite("weight", check_matrix("weight", weight, "(K, D)"))
    if isinstance(taus, str) or not isinstance(taus, Sequence) or not taus:
        raise ArgumentError(f"taus: expected numbers to try, at least one, but got {taus!r}.")
    taus = sorted(check_number(f"taus[{i}]", tau, at_least=0) for i, tau in enumerate(taus))
    K = weight.shape[0]
    features, labels = _check_samples(features, labels, K, width=weight.shape[1])
    w = like(weight.detach(), features)
    factors = [_row_factors(w, tau) for tau in taus]
    right = torch.zeros(len(taus), K, dtype=torch.int64, device=features.device)
    rows = max(1, _CHUNK_VALUES // K)
    for f, y in zip(features.split(rows), labels.split(rows), strict=True):
        logits = f @ w.T
        for t, factor in enumerate(factors):
            right[t] += torch.bincount(y[(logits * factor).argmax(1) == y], minlength=K)
    number = torch.bincount(labels, minlength=K).cpu()
    accuracy = (right.cpu()[:, number > 0] / number[number > 0].double()).mean(1)
    return taus[int((accuracy >= accuracy.max() - 1e-12).nonzero()[0])]


def ncm(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Nearest class mean as a linear classifier: the unit-length class means, to be used without a bias.

    The largest logit is the class whose mean has the largest cosine to the feature.

    Args:
        features: the training images', shape ``(N, D)``.
        labels: shape ``(N,)``.
        num_classes: K; every class needs a row.

    Returns:
        Weight ``(K, D)``, unit rows, on the device of ``features``; float32, or float64 where the features are.

    Raises:
        ArgumentError: arguments that do not fit.
        DataError: a class without a row, or whose features cancel out.

    Source: Kang et al., ICLR 2020, arXiv 1910.09217 (NCM, with cosine similarity).
    Deviation: features are normalised before they are averaged, as in :func:`krdistill.rectify.class_means`.
    """
    return class_means(features, labels, num_classes)


def apply_second_stage(
    linear: nn.Linear, method: Method, features: Tensor, labels: Tensor, **options: Any
) -> dict[str, float]:
    """Balances a network's last linear layer, in place.

    Args:
        linear: the layer, K outputs; it keeps its dtype and device. A layer without a bias stays without one; for
            ``tau-norm`` and ``ncm`` a bias becomes zero.
        method: what to do.

            - ``balanced-softmax``: :func:`~krdistill.rectify.refit_classifier`, fitted to its optimum; options: its
              own, but ``bias``.
            - ``crt``: :func:`crt`; options: its own, but ``bias``.
            - ``lws``: :func:`lws`; options: its own.
            - ``tau-norm``: :func:`tau_norm`; options: ``tau``, or else ``held_out``, the (features, labels) that
              :func:`choose_tau` takes, and its ``taus``. The training images are not used.
            - ``ncm``: :func:`ncm`; no options.

        features: the training images' input to the layer, shape ``(N, D)``.
        labels: shape ``(N,)``.
        options: see above.

    Returns:
        What was chosen on the way, for the record: ``{"tau": ...}``, or nothing.

    Raises:
        ArgumentError: an unknown method or option, or one that is needed and missing; otherwise as the method.
        ModelError: a layer that computes something else than a linear map, such as a normalised head.
        DataError: as the method.
    """
    check_choice("method", method, METHODS)
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ModelError(
            f"linear: expected a plain torch.nn.Linear, but got {type(linear).__name__}. "
            "A second stage re-makes a linear classifier; a normalised or fixed head has none."
        )
    check_matrix("features", features, "(N, D)", columns=linear.in_features)
    bias: Tensor | None = None
    record: dict[str, float] = {}
    if method == "balanced-softmax":
        _check_options(method, options, refit_classifier, "bias")
        has_bias = linear.bias is not None
        weight, bias = refit_classifier(features, labels, linear.out_features, bias=has_bias, **options)
    elif method == "crt":
        _check_options(method, options, crt, "bias")
        weight, bias = crt(features, labels, linear.out_features, bias=linear.bias is not None, **options)
    elif method == "lws":
        _check_options(method, options, lws)
        scales = like(lws(linear.weight, linear.bias, features, labels, **options), linear.weight)
        weight = scales.unsqueeze(1) * linear.weight.detach()
        bias = None if linear.bias is None else scales * linear.bias.detach()
    elif method == "tau-norm":
        _check_options(method, options, _normalised)
        weight, record["tau"] = _normalised(linear.weight, **options)
    else:
        _check_options(method, options, ncm)
        weight = ncm(features, labels, linear.out_features)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if linear.bias is not None:
            linear.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)
    return record


def _normalised(
    weight: Tensor,
    *,
    tau: float | None = None,
    held_out: tuple[Tensor, Tensor] | None = None,
    taus: Sequence[float] = TAUS,
) -> tuple[Tensor, float]:
    """:func:`tau_norm` with a tau that is given or chosen."""
    if (tau is None) == (held_out is None):
        raise ArgumentError(
            "options: 'tau-norm' needs either tau, or held_out=(features, labels) to choose it on, but got "
            f"{'neither' if tau is None else 'both'}."
        )
    if held_out is not None:
        if not isinstance(held_out, tuple | list) or len(held_out) != 2:
            raise ArgumentError(f"held_out: expected (features, labels), but got {type(held_out).__name__}.")
        tau = choose_tau(weight, *held_out, taus=taus)
    assert tau is not None
    return tau_norm(weight, tau), float(tau)


def _check_options(method: str, options: dict[str, Any], function: Callable[..., Any], *own: str) -> None:
    """Only keyword arguments of the function, less those that are ours to give."""
    parameters = inspect.signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in own]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ArgumentError(f"options: {method!r} takes {', '.join(known) or 'none'}, but got {', '.join(unknown)}.")


def _check_samples(
    features: Tensor, labels: Tensor, num_classes: int, *, width: int | None = None, every_class: bool = False
) -> tuple[Tensor, Tensor]:
    """Features, float32 at least, and labels on their device."""
    check_finite("features", check_matrix("features", features, "(N, D)", columns=width))
    labels = check_labels(labels, features.shape[0], num_classes).to(features.device)
    number = torch.bincount(labels, minlength=num_classes)
    missing = (number == 0).nonzero().flatten().tolist()
    if len(labels) == 0 or (every_class and missing):
        shown = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        raise DataError(f"labels: {len(missing)} of {num_classes} classes have no row: class {shown}.")
    return at_least_float32(features.detach()), labels


def _row_factors(weight: Tensor, tau: float) -> Tensor:
    """What each row is multiplied by, ``(K,)``; 1 for a zero row."""
    length = torch.linalg.vector_norm(weight, dim=1)
    return torch.where(length > 0, length, torch.ones_like(length)) ** -tau


def _fit(
    logits: Callable[[Tensor], Tensor],
    parameters: list[Tensor],
    features: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    momentum: float,
    weight_decay: float,
    seed: int,
) -> None:
    """Cross-entropy with class-balanced sampling; SGD, the learning rate on a cosine to zero."""
    epochs = check_integer("epochs", epochs, at_least=1)
    steps = math.ceil(len(labels) / check_integer("batch_size", batch_size, at_least=1))
    optimizer = torch.optim.SGD(
        parameters,
        lr=check_number("lr", lr, above=0),
        momentum=check_number("momentum", momentum, at_least=0, below=1),
        weight_decay=check_number("weight_decay", weight_decay, at_least=0),
    )
    for epoch in range(epochs):
        order = class_balanced_order(labels, seed, epoch).to(features.device)
        for step, index in enumerate(order.tensor_split(steps)):
            done = (epoch * steps + step) / (epochs * steps)
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * done))
            with torch.enable_grad():
                loss = F.cross_entropy(logits(features[index]), labels[index])
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise DataError(
            f"features: the fit diverged with lr={lr:g}. Are the features of very different lengths? "
            "Take a lower learning rate, or normalise them."
        )
