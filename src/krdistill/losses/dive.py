"""DiVE: the student follows the power-normalised virtual examples of a balanced teacher."""

from __future__ import annotations

from torch import Tensor, nn

from .._checks import at_least_float32, check_logits, check_number, check_per_class, describe
from ..errors import ArgumentError
from ..rectify.power_normalisation import power_normalise
from ..rectify.prior_removal import remove_prior
from .kd import softened_divergence


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
    check_logits("student_logits", student_logits)
    check_logits("teacher_logits", teacher_logits, rows=student_logits.shape[0], columns=student_logits.shape[1])
    T = check_number("temperature", temperature, above=0)
    target = power_normalise(teacher_logits.detach(), power=power)
    return softened_divergence(at_least_float32(student_logits), target, T, owned=True)


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
        if self.log_prior is None:
            return dive_loss(student_logits, teacher_logits, power=self.power, temperature=self.temperature)
        check_logits("student_logits", student_logits)
        check_logits("teacher_logits", teacher_logits, rows=student_logits.shape[0], columns=student_logits.shape[1])
        # The power of the prediction without its prior: p (z - log pi) = p z - p log pi, one array less.
        target = remove_prior(power_normalise(teacher_logits.detach(), power=self.power), self.log_prior, self.power)
        return softened_divergence(at_least_float32(student_logits), target, self.temperature, owned=True)
