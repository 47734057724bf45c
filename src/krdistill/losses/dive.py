"""DiVE: the student follows the power-normalised virtual examples of a balanced teacher."""

from __future__ import annotations

from torch import Tensor, nn

from .._checks import check_number, check_per_class, describe
from ..errors import ArgumentError
from ..rectify.power_normalisation import power_normalise
from ..rectify.prior_removal import remove_prior
from .kd import kd_divergence


def dive_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, power: float = 0.5, temperature: float = 3.0
) -> Tensor:
    r"""How far the student is from the teacher's power-normalised prediction.

    .. math:: T^2 \operatorname{KL}\big(t \,\|\, \operatorname{softmax}(z_s / T)\big), \qquad
        t_k \propto \operatorname{softmax}(z_t / T)_k^{\,p}

    Args:
        student_logits: z_s, shape ``(B, K)``.
        teacher_logits: z_t of a balanced teacher, shape ``(B, K)``; no gradient flows to them.
        power: p > 0; below 1 the target is flatter. 1 is plain distillation.
        temperature: T > 0.

    Returns:
        Shape ``(B,)``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: arguments that do not fit.

    Source: He, Wu, Wei, "Distilling Virtual Examples for Long-tailed Recognition", ICCV 2021, arXiv 2103.15042.
    """
    target = power_normalise(teacher_logits, power=power)
    return kd_divergence(student_logits, target, temperature=temperature)


class VirtualExamples(nn.Module):
    """:func:`dive_loss` as a module; labels are taken, for a common call, and not used.

    Args:
        log_prior: what to remove from the teacher's logits first, ``(K,)``, or None for a teacher that is balanced.
        power: p > 0.
        temperature: T > 0.

    Deviation: the paper's teacher is trained with balanced softmax. Of one trained with cross-entropy, the log prior is
    removed instead, which has the same optimum.
    """

    log_prior: Tensor | None

    def __init__(self, log_prior: Tensor | None = None, *, power: float = 0.5, temperature: float = 3.0) -> None:
        super().__init__()
        self.power = check_number("power", power, above=0)
        self.temperature = check_number("temperature", temperature, above=0)
        if log_prior is not None:
            if not isinstance(log_prior, Tensor) or log_prior.ndim != 1:
                raise ArgumentError(f"log_prior: expected shape (K,), but got {describe(log_prior)}.")
            log_prior = check_per_class("log_prior", log_prior, len(log_prior)).detach().float()
        self.register_buffer("log_prior", log_prior)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.log_prior is not None:
            teacher_logits = remove_prior(teacher_logits, self.log_prior)
        return dive_loss(student_logits, teacher_logits, power=self.power, temperature=self.temperature)
