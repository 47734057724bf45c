"""Long-tailed knowledge distillation (LTKD): the divergence split over groups of classes, and each part balanced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._checks import at_least_float32, check_logits, check_number, describe
from ..errors import ArgumentError
from ..priors import ClassGroups


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
    return _parts(student_logits, teacher_logits, groups, temperature, rebalance=rebalance, reweight=True)[0]


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
    return _parts(student_logits, teacher_logits, groups, temperature, rebalance=False, reweight=reweight)[1]


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
    cross, within = _parts(student_logits, teacher_logits, groups, temperature, rebalance=rebalance, reweight=reweight)
    return (alpha * cross + beta * within) * float(temperature) ** 2


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


def _parts(
    student: Tensor,
    teacher: Tensor,
    groups: ClassGroups | Tensor | tuple[Tensor, list[int]],
    temperature: float,
    *,
    rebalance: bool,
    reweight: bool,
) -> tuple[Tensor, Tensor]:
    """Cross-group and within-group divergence, each ``(B,)``; ``groups`` may be what :func:`_partition` gave."""
    B, K = check_logits("student_logits", student).shape
    check_logits("teacher_logits", teacher, rows=B, columns=K)
    T = check_number("temperature", temperature, above=0)
    order, sizes = groups if isinstance(groups, tuple) else _partition(groups, K)
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    cross, within = _GroupDivergences.apply(
        student.to(dtype), teacher.detach().to(dtype), order.to(student.device), sizes, T, rebalance, reweight
    )
    return cross, within


class _GroupDivergences(torch.autograd.Function):
    """Both divergences with the gradient written out, so that two predictions are all that is kept.

    To z_s / T, in group G: the cross-group part's gradient is (q_G - p^_G) q~, the within-group part's w_G (q~ - p~).
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        order: Tensor,
        sizes: list[int],
        temperature: float,
        rebalance: bool,
        reweight: bool,
    ) -> tuple[Tensor, Tensor]:
        log_t, sums_t = _within(teacher, order, sizes, temperature)
        log_s, sums_s = _within(student, order, sizes, temperature)
        shares, log_q = _group_log(sums_t), _group_log(sums_s)
        target = shares
        if rebalance:
            # p times s, renormalised: the mean of the S cancels, so log s is -log S
            target = F.log_softmax(shares - shares.logsumexp(0, keepdim=True), dim=1)
        weights = torch.ones_like(shares) if reweight else shares.exp()
        cross = F.kl_div(log_q, target, reduction="none", log_target=True).sum(1)
        p = log_t.exp()
        ratio = log_t.sub_(log_s).mul_(p)
        inner = torch.stack([piece.sum(1) for piece in ratio.split(sizes, dim=1)], dim=1)
        within = (weights * inner).sum(1)
        del log_t, ratio
        # Back in the order of the classes, so that the backward pass writes its result in place.
        back = order.argsort()
        q = log_s.exp_().index_select(1, back)
        del log_s
        p = p.index_select(1, back)
        number = torch.arange(len(sizes), device=order.device).repeat_interleave(
            torch.tensor(sizes, device=order.device)
        )
        ctx.save_for_backward(q, p, weights, log_q.exp() - target.exp(), number[back])
        ctx.temperature, ctx.same = temperature, reweight
        return cross, within

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        q, p, weights, difference, group = ctx.saved_tensors
        to_cross, to_within = (grad.unsqueeze(1) / ctx.temperature for grad in grads)
        pull = weights * to_within
        grad = (pull + to_cross * difference).index_select(1, group).mul_(q)
        share = to_within.expand_as(p) if ctx.same else pull.index_select(1, group)
        return grad.addcmul_(p, share, value=-1), None, None, None, None, None, None


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
        cross, within = _parts(
            student_logits,
            teacher_logits,
            (self.order, self.sizes),
            self.temperature,
            rebalance=self.rebalance,
            reweight=self.reweight,
        )
        return (self.alpha * cross + self.beta * within) * self.temperature**2

    def extra_repr(self) -> str:
        return (
            f"group sizes {self.sizes}, alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, "
            f"rebalance={self.rebalance}, reweight={self.reweight}"
        )
