"""A classifier re-fitted: the teacher keeps its features, and a balanced classifier on them answers for it."""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from .._checks import check_finite, check_integer, check_labels, check_matrix, check_number, check_per_class
from ..errors import DataError
from ..outputs import Outputs


def refit_classifier(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    bias: bool = True,
    tau: float = 1.0,
    weight_decay: float = 1e-5,
    max_steps: int = 200,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A linear classifier on frozen features, fitted with balanced softmax: no class prior is in it.

    .. math:: \min_{W, b} \; \operatorname{mean}_x
        \operatorname{CE}\big(W \tfrac{f(x)}{r} + b + \tau \log \pi, \; y(x)\big)
        + \tfrac{\lambda}{2} \|W\|^2, \qquad r^2 = \operatorname{mean}_x \|f(x)\|^2

    A larger penalty takes from the tail first, whose images count little in the mean. The problem is convex and its
    solution depends neither on the features' scale nor on a learning rate or a seed.

    Args:
        features: f, of training images, shape ``(N, D)``.
        labels: y, shape ``(N,)``; pi are their frequencies.
        num_classes: K; every class needs a row.
        bias: false leaves b at zero.
        tau: how much of the prior the loss holds: 1 is balanced softmax; more gives rare classes a larger margin.
        weight_decay: lambda > 0.
        max_steps: of L-BFGS. With so small a penalty it ends before the last digits are settled: features that differ
            in their last bits, as another machine's do, give logits that differ by some hundredths.
        row_weights: what every row counts in the mean, shape ``(N,)``, >= 0; all alike where None. pi stays as it is.

    Returns:
        Weight ``(K, D)``, for features as they are (1 / r is in it), and bias ``(K,)``, of mean 0; float32, on the CPU.

    Raises:
        ArgumentError: arguments that do not fit, or features that are not finite.
        DataError: a class without a row, or features that are all zero.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, arXiv 2007.10740 (the
    loss); Kang et al., "Decoupling Representation and Classifier", ICLR 2020, arXiv 1910.09217 (re-training alone).
    Deviation: fitted to its optimum with an L2 penalty, where cRT takes some epochs of class-balanced draws.
    """
    K = check_integer("num_classes", num_classes, at_least=2)
    check_finite("features", check_matrix("features", features, "(N, D)"))
    labels = check_labels(labels.cpu() if isinstance(labels, Tensor) else labels, features.shape[0], K).long()
    weight_decay = check_number("weight_decay", weight_decay, above=0)
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
    f = features.detach().cpu().double()
    scale = float(f.square().sum(1).mean().sqrt())
    if scale == 0:
        raise DataError("features: expected features that differ from zero, but all of them are zero.")
    f = f / scale
    N, D = f.shape
    log_prior = check_number("tau", tau, at_least=0) * (counts.double() / N).log()

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.from_numpy(flat).view(K, D + 1)
        W, b = x[:, :D], x[:, D]
        log_p = torch.log_softmax(torch.addmm(b + log_prior, f, W.T), 1)
        own = log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        loss = -(own.mean() if shares is None else shares @ own) + 0.5 * weight_decay * W.square().sum()
        residual = log_p.exp_()
        residual[torch.arange(N), labels] -= 1
        if shares is None:
            residual /= N
        else:
            residual *= shares.unsqueeze(1)
        gradient = torch.cat([residual.T @ f + weight_decay * W, residual.sum(0).unsqueeze(1)], 1)
        if not bias:
            gradient[:, D] = 0
        return float(loss), gradient.numpy().ravel()

    start = np.zeros(K * (D + 1))
    found = minimize(
        value,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": check_integer("max_steps", max_steps, at_least=1)},
    )
    x = torch.from_numpy(found.x).view(K, D + 1)
    return (x[:, :D] / scale).float(), (x[:, D] - x[:, D].mean()).float()


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
