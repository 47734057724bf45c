"""A classifier re-fitted: the teacher keeps its features, and a balanced classifier on them answers for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from .._checks import check_finite, check_integer, check_labels, check_matrix, check_number, check_per_class
from ..errors import DataError
from ..outputs import Outputs

_WHOLE = 1 << 26  # logits, N * K, that are held at once in float64: half a GiB
_PIECE = {"cpu": 1 << 20, "cuda": 1 << 26}  # logits in work at once beyond that: what a cache holds, and 256 MiB
_EVALUATIONS = 130  # 70 to 190, of features of 100 to 1,000 classes
_TOLERANCE = 1e-5  # of the largest entry of the gradient
_SHARE = 0.05  # of a class's share of the rows, which bounds its gradient: else a rare class would count as fitted


def refit_classifier(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    bias: bool = True,
    tau: float = 1.0,
    weight_decay: float | None = None,
    max_steps: int = 200,
    row_weights: Tensor | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A linear classifier on frozen features, fitted with balanced softmax: no class prior is in it.

    .. math:: \min_{W, b} \; \operatorname{mean}_x
        \operatorname{CE}\big(W \tfrac{f(x)}{r} + b + \tau \log \pi, \; y(x)\big)
        + \tfrac{\lambda}{2} \|W\|^2, \qquad r^2 = \operatorname{mean}_x \|f(x)\|^2

    A larger penalty takes from the tail first, whose images count little in the mean. The problem is convex and its
    solution depends neither on the features' scale nor on a learning rate or a seed.

    Up to N K = 2^26 the fit is done on the CPU in float64. A larger one is done on ``device`` in float32, some rows at
    a time, and takes a copy of the features, a few MiB (some 256 on a GPU), and 25 times the classifier in float64 for
    L-BFGS, which stays on the CPU. It ends where no entry of the gradient exceeds 1e-5, or a twentieth of the rarest
    class's share of the rows where that is less: a rare class's gradient is no larger than its share.

    Args:
        features: f, of training images, shape ``(N, D)``.
        labels: y, shape ``(N,)``; pi are their frequencies.
        num_classes: K; every class needs a row.
        bias: false leaves b at zero.
        tau: how much of the prior the loss holds: 1 is balanced softmax; more gives rare classes a larger margin.
        weight_decay: lambda > 0; by default 1e-5, and 1e-3 / K for more than 100 classes. The more classes, the smaller
            the part of the mean that an image of a rare one has: at K = 1,000 a fixed 1e-5 leaves the rarest third
            hardly fitted.
        max_steps: of L-BFGS. With so small a penalty it ends before the last digits are settled: features that differ
            in their last bits, as another machine's do, give logits that differ by some hundredths.
        row_weights: what every row counts in the mean, shape ``(N,)``, >= 0; all alike where None. pi stays as it is.
        device: of a large fit; by default that of the features.

    Returns:
        Weight ``(K, D)``, for features as they are (1 / r is in it), and bias ``(K,)``, of mean 0; float32, on the CPU.

    Raises:
        ArgumentError: arguments that do not fit, or features that are not finite.
        DataError: a class without a row, or features that are all zero.

    Cost: 4 N K D operations a step, up to 200 steps and some more; `benchmarks/refit.py` measures it.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, arXiv 2007.10740 (the
    loss); Kang et al., "Decoupling Representation and Classifier", ICLR 2020, arXiv 1910.09217 (re-training alone).
    Deviation: fitted to its optimum with an L2 penalty, where cRT takes some epochs of class-balanced draws.
    """
    K = check_integer("num_classes", num_classes, at_least=2)
    check_finite("features", check_matrix("features", features, "(N, D)"))
    labels = check_labels(labels.cpu() if isinstance(labels, Tensor) else labels, features.shape[0], K).long()
    weight_decay = checked_weight_decay(weight_decay, K)
    shares = None
    if row_weights is not None:
        row_weights = check_per_class("row_weights", row_weights, len(labels), low=0, expected="numbers >= 0")
        shares = row_weights.detach().cpu().double()
        if not bool((shares > 0).any()):
            raise DataError("row_weights: expected a row that counts, but all of them are zero.")
        shares = shares / shares.sum()
    counts = torch.bincount(labels, minlength=K)
    if missing := (counts == 0).nonzero().flatten().tolist():
        raise DataError(f"labels: {len(missing)} of {K} classes have no row, among them class {missing[0]}.")
    N, D = features.shape
    whole = N * K <= _WHOLE
    # a copy of one's own: it is divided in place
    f = features.detach().cpu().double() if whole else features.detach().to(device, torch.float32, copy=True)
    scale = float(f.square().sum(1).mean().sqrt())
    if scale == 0:
        raise DataError("features: expected features that differ from zero, but all of them are zero.")
    f = f / scale if whole else f.div_(scale)
    log_prior = check_number("tau", tau, at_least=0) * (counts.double() / N).log()
    # the dtype first: not every device has float64
    log_prior, labels = log_prior.to(f.dtype).to(f.device), labels.to(f.device)
    shares = None if shares is None else shares.to(f.dtype).to(f.device)
    value = _objective(f, labels, log_prior, shares, weight_decay=weight_decay, bias=bias)
    start = np.zeros(K * (D + 1))
    found = minimize(
        value,
        start,
        jac=True,
        method="L-BFGS-B",
        options={
            "maxiter": check_integer("max_steps", max_steps, at_least=1),
            "gtol": min(_TOLERANCE, _SHARE * int(counts.min()) / N),
        },
    )
    x = torch.from_numpy(found.x).view(K, D + 1)
    return (x[:, :D] / scale).float(), (x[:, D] - x[:, D].mean()).float()


def checked_weight_decay(given: float | None, num_classes: int) -> float:
    """The penalty that was asked for, or the default for so many classes; see :func:`refit_classifier`."""
    return min(1e-5, 1e-3 / num_classes) if given is None else check_number("weight_decay", given, above=0)


def _objective(
    f: Tensor, labels: Tensor, log_prior: Tensor, shares: Tensor | None, *, weight_decay: float, bias: bool
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The objective and its gradient at weights and biases ``(K * (D + 1),)``, whole for float64, else in pieces."""
    N, D = f.shape
    K = len(log_prior)
    rows = N if f.dtype == torch.float64 else max(1, _PIECE.get(f.device.type, _PIECE["cpu"]) // K)

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).view(K, D + 1).to(f.dtype).to(f.device)
        W, b = x[:, :D], x[:, D] + log_prior
        own = torch.empty_like(f[:, 0])
        by_weight, by_bias = None, None
        for start in range(0, N, rows):
            piece = slice(start, start + rows)
            y = labels[piece]
            log_p = torch.log_softmax(torch.addmm(b, f[piece], W.T), 1)
            own[piece] = log_p.gather(1, y.unsqueeze(1)).squeeze(1)
            residual = log_p.exp_()
            residual[torch.arange(len(y), device=y.device), y] -= 1
            if shares is None:
                residual /= N
            else:
                residual *= shares[piece].unsqueeze(1)
            if by_weight is None or by_bias is None:
                by_weight, by_bias = residual.T @ f[piece], residual.sum(0)
            else:
                by_weight.addmm_(residual.T, f[piece])
                by_bias += residual.sum(0)
        assert by_weight is not None and by_bias is not None
        own = own.cpu().double()
        fit = own.mean() if shares is None else shares.cpu().double() @ own
        loss = float(0.5 * weight_decay * W.square().sum()) - float(fit)
        gradient = torch.cat([by_weight + weight_decay * W, by_bias.unsqueeze(1)], 1)
        if not bias:
            gradient[:, D] = 0
        return loss, gradient.cpu().double().numpy().ravel()

    return value


def seconds_to_fit(num_rows: int, num_classes: int, dim: int, device: torch.device | None = None) -> float:
    """About how long :func:`refit_classifier` takes, by evaluations of its objective on some rows of noise.

    Args:
        num_rows: N.
        num_classes: K.
        dim: D.
        device: as there.

    Returns:
        Seconds. How many evaluations it will take is not known beforehand: the middle of what was seen is taken.
    """
    N, K, D = num_rows, num_classes, dim
    some = min(N, max(1, _PIECE["cpu"] // K))
    more = min(N, 3 * some)
    generator, start = torch.Generator().manual_seed(0), np.zeros(K * (D + 1))

    def seconds(rows: int) -> float:
        f = torch.rand(rows, D, generator=generator)
        f = f.double() if N * K <= _WHOLE else f.to(device)
        labels = torch.arange(rows, device=f.device) % K
        value = _objective(f, labels, f.new_zeros(K), None, weight_decay=1e-5, bias=True)
        value(start)
        started = time.perf_counter()
        value(start)
        return time.perf_counter() - started

    once = seconds(more)
    if more < N:  # what does not grow with the rows counts once
        once += max(0.0, once - seconds(some)) / (more - some) * (N - more)
    return once * _EVALUATIONS


class RefittedTeacher(nn.Module):
    """The answers of a teacher whose classifier was re-fitted: logits anew from the feature, all else as it was.

    Args:
        weight: shape ``(K, D)``; see :func:`refit_classifier`.
        bias: shape ``(K,)``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        K, D = check_finite("weight", check_matrix("weight", weight, "(K, D)")).shape
        check_per_class("bias", bias, K)
        self.classifier = nn.utils.skip_init(nn.Linear, D, K).requires_grad_(False)
        with torch.no_grad():
            self.classifier.weight.copy_(weight)
            self.classifier.bias.copy_(bias)

    def forward(self, answer: Outputs) -> Outputs:
        feature = check_matrix("teacher_features", answer.feature, "(B, D)", columns=self.classifier.in_features)
        return answer._replace(logits=self.classifier(feature.float()))
