"""Long-tailed knowledge distillation (LTKD): the divergence split over groups of classes, and each part balanced."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import at_least_float32, check_logits, check_number, describe
from ..errors import ArgumentError
from ..priors import ClassGroups
from ._rows import by_rows, row_slices


def group_log_probabilities(logits: Tensor, groups: ClassGroups | Tensor) -> Tensor:
    r"""How much of the prediction each group of classes holds.

    .. math:: \log p_G = \log \sum_{k \in G} \operatorname{softmax}(z)_k

    Args:
        logits: z, already divided by the temperature, shape ``(B, K)``.
        groups: the classes' groups, or one group number >= 0 per class, shape ``(K,)``. Numbers without a class are
            left out, so that G counts the groups that hold at least one class, in the order of their numbers.

    Returns:
        Shape ``(B, G)``, normalised over the groups; float32, or float64 where the logits are.

    Raises:
        ArgumentError: shapes or groups that do not fit.
    """
    K = check_logits("logits", logits).shape[1]
    order, sizes = _partition(groups, K)
    pieces = at_least_float32(logits).index_select(1, order.to(logits.device)).split(sizes, dim=1)
    return _group_log(torch.stack([piece.logsumexp(1) for piece in pieces], dim=1))


def cross_group_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    groups: ClassGroups | Tensor,
    *,
    temperature: float = 4.0,
    rebalance: bool = True,
) -> Tensor:
    r"""The divergence of the groups' shares, the teacher's evened out over the batch.

    .. math::
        \operatorname{KL}(\hat p \,\|\, q), \qquad
        \hat p_G(n) = \frac{s_G \, p_G(n)}{\sum_{G'} s_{G'} \, p_{G'}(n)}, \qquad
        s_G = \frac{\operatorname{mean}_{G'} S_{G'}}{S_G}, \qquad S_G = \sum_n p_G(n)

    p and q are the teacher's and the student's softened shares of :func:`group_log_probabilities`, n runs over the
    batch. Without the factor T^2.

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        groups: as in :func:`group_log_probabilities`.
        temperature: T > 0.
        rebalance: False takes the teacher's shares as they are; each sample's value then depends on its own row
            alone. With it, the target depends on the whole batch, and of a batch of one it is uniform.

    Returns:
        Shape ``(B,)``; float32, or float64 where either logits are. 0 where there is one group.

    Raises:
        ArgumentError: arguments that do not fit.

    Source, deviation: as in :func:`ltkd_loss`.
    """
    return _loss(student_logits, teacher_logits, groups, temperature, 1.0, 0.0, rebalance=rebalance, reweight=True)


def within_group_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    groups: ClassGroups | Tensor,
    *,
    temperature: float = 4.0,
    reweight: bool = True,
) -> Tensor:
    r"""The divergences inside each group, with the same weight for every group.

    .. math:: \sum_G w_G \, \operatorname{KL}(\tilde p_G \,\|\, \tilde q_G), \qquad
        \tilde p_{G,k} = p_k / p_G \;\; (k \in G), \qquad
        w_G = \begin{cases} 1 & \text{reweight} \\ p_G & \text{otherwise} \end{cases}

    Without the factor T^2. With ``reweight=False`` and ``rebalance=False`` the two parts add up to the divergence of
    the whole predictions, KL(p || q).

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        groups: as in :func:`group_log_probabilities`.
        temperature: T > 0.
        reweight: False weighs each group with the teacher's share p_G of it.

    Returns:
        Shape ``(B,)``; float32, or float64 where either logits are. A group of one class adds exactly 0.

    Raises:
        ArgumentError: arguments that do not fit.

    Source, deviation: as in :func:`ltkd_loss`.
    """
    return _loss(student_logits, teacher_logits, groups, temperature, 0.0, 1.0, rebalance=False, reweight=reweight)


def ltkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    groups: ClassGroups | Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    temperature: float = 4.0,
    rebalance: bool = True,
    reweight: bool = True,
) -> Tensor:
    r"""Long-tailed knowledge distillation: rebalanced cross-group and reweighted within-group divergence.

    .. math:: T^2 \, (\alpha \, L_{\text{cross}} + \beta \, L_{\text{within}})

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t, shape ``(B, K)``; no gradient flows to them.
        groups: as in :func:`group_log_probabilities`; the paper's are the thirds of the classes by count, see
            :meth:`krdistill.priors.ClassPrior.groups`.
        alpha: weight of :func:`cross_group_divergence`, >= 0.
        beta: weight of :func:`within_group_divergence`, >= 0.
        temperature: T > 0.
        rebalance, reweight: as there. With both False and both weights 1 the loss is
            :func:`~krdistill.losses.kd_divergence`.

    Returns:
        Shape ``(B,)``; float32, or float64 where either logits are, under autocast too.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: Kim, "Distilling Balanced Knowledge from a Biased Teacher", CVPR 2026, arXiv 2506.18496.
    Deviation: exact form inferred: we know the decomposition and what is balanced in each part from descriptions of
    the paper, not its equations or code; the published alpha, beta and T are unknown to us, and the defaults here are
    ours. The sums S are taken over the batch that is given: under data parallelism, over each process's own.
    """
    alpha, beta = check_number("alpha", alpha, at_least=0), check_number("beta", beta, at_least=0)
    T = check_number("temperature", temperature, above=0)
    return _loss(
        student_logits, teacher_logits, groups, T, alpha * T**2, beta * T**2, rebalance=rebalance, reweight=reweight
    )


def _partition(groups: ClassGroups | Tensor, num_classes: int | None) -> tuple[Tensor, list[int]]:
    """The classes in the order of their groups, and how many each group holds; groups without a class are gone."""
    index = groups.index if isinstance(groups, ClassGroups) else groups
    if (
        not isinstance(index, Tensor)
        or index.is_floating_point()
        or index.is_complex()
        or index.dtype == torch.bool
        or index.ndim != 1
        or (num_classes is not None and len(index) != num_classes)
        or len(index) < 2
        or int(index.min()) < 0
    ):
        wanted = "(K,)" if num_classes is None else f"({num_classes},)"
        came = f"ClassGroups of {len(index)} classes" if isinstance(groups, ClassGroups) else describe(index)
        raise ArgumentError(f"groups: expected one group number >= 0 per class, shape {wanted}, but got {came}.")
    # sort, not bincount: group numbers may be large and sparse
    numbers, order = index.long().sort(stable=True)
    return order, numbers.unique_consecutive(return_counts=True)[1].tolist()


def _group_log(sums: Tensor) -> Tensor:
    return F.log_softmax(sums, dim=1)


def _loss(
    student: Tensor,
    teacher: Tensor,
    groups: ClassGroups | Tensor | tuple[Tensor, list[int]],
    temperature: float,
    alpha: float,
    beta: float,
    *,
    rebalance: bool,
    reweight: bool,
) -> Tensor:
    """alpha times cross-group plus beta times within-group divergence; ``groups`` may be what :func:`_partition` gave.

    The gradient is written out, so that one array is all that is kept. To z_s / T, in group G: the cross-group part's
    is (q_G - p^_G) q~, the within-group part's w_G (q~ - p~).
    """
    B, K = check_logits("student_logits", student).shape
    check_logits("teacher_logits", teacher, rows=B, columns=K)
    T = check_number("temperature", temperature, above=0)
    order, sizes = groups if isinstance(groups, tuple) else _partition(groups, K)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    student, teacher, order = student.to(dtype), teacher.detach().to(dtype), order.to(student.device)
    back = order.argsort()
    with torch.no_grad():
        # The teacher's shares of all rows come first: the target rests on them.
        log_p = torch.empty_like(teacher)
        all_sums = []
        for rows in row_slices(teacher):
            log_p[rows], sums = _within(teacher[rows], order, sizes, T)
            all_sums.append(sums)
        shares = target = _group_log(torch.cat(all_sums))
        if rebalance:
            # p times s, renormalised: the mean of the S cancels, so log s is -log S
            target = F.log_softmax(shares - shares.logsumexp(0, keepdim=True), dim=1)
        weights = torch.ones_like(shares) if reweight else shares.exp()

    def kernel(rows: slice) -> tuple[Tensor, Tensor]:
        log_s, sums = _within(student[rows], order, sizes, T)
        log_q = _group_log(sums)
        cross = F.kl_div(log_q, target[rows], reduction="none", log_target=True).sum(1)
        p = log_p[rows].exp()
        ratio = (log_p[rows] - log_s).mul_(p)
        inner = torch.stack([piece.sum(1) for piece in ratio.split(sizes, dim=1)], dim=1)
        within = (weights[rows] * inner).sum(1)
        pull = weights[rows] * (beta / T)
        push = pull + (log_q.exp() - target[rows].exp()) * (alpha / T)
        gradient = log_s.exp_()
        for q, told, i, j in zip(
            gradient.split(sizes, 1), p.split(sizes, 1), push.split(1, 1), pull.split(1, 1), strict=True
        ):
            q.mul_(i).addcmul_(told, j, value=-1)
        return alpha * cross + beta * within, gradient.index_select(1, back)

    return by_rows(student, kernel, out=log_p)


def _within(logits: Tensor, order: Tensor, sizes: list[int], temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities inside each group, ``(B, K)`` in the order of the groups, and their log-sums ``(B, G)``."""
    z = logits.index_select(1, order).div_(temperature)
    sums = []
    for piece in z.split(sizes, dim=1):
        top = piece.amax(1, keepdim=True)
        piece.sub_(top)
        normaliser = piece.logsumexp(1, keepdim=True)
        piece.sub_(normaliser)
        sums.append(top + normaliser)
    return z, torch.cat(sums, dim=1)


class LTKD(nn.Module):
    """:func:`ltkd_loss` as a module; labels are taken, for a common call, and not used.

    Args:
        groups: the classes' groups, or one group number per class ``(K,)``; kept as a buffer that no state holds.
        alpha, beta, temperature, rebalance, reweight: as in :func:`ltkd_loss`.
    """

    order: Tensor

    def __init__(
        self,
        groups: ClassGroups | Tensor,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        temperature: float = 4.0,
        rebalance: bool = True,
        reweight: bool = True,
    ) -> None:
        super().__init__()
        order, self.sizes = _partition(groups, None)
        self.register_buffer("order", order, persistent=False)
        self.alpha = check_number("alpha", alpha, at_least=0)
        self.beta = check_number("beta", beta, at_least=0)
        self.temperature = check_number("temperature", temperature, above=0)
        self.rebalance, self.reweight = bool(rebalance), bool(reweight)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        check_logits("student_logits", student_logits, columns=len(self.order))
        return _loss(
            student_logits,
            teacher_logits,
            (self.order, self.sizes),
            self.temperature,
            self.alpha * self.temperature**2,
            self.beta * self.temperature**2,
            rebalance=self.rebalance,
            reweight=self.reweight,
        )

    def extra_repr(self) -> str:
        return (
            f"group sizes {self.sizes}, alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, "
            f"rebalance={self.rebalance}, reweight={self.reweight}"
        )
