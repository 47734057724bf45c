"""Power normalisation: the teacher's probabilities are raised to a power and renormalised."""

from __future__ import annotations

from torch import Tensor

from .._checks import at_least_float32, check_logits, check_number


def power_normalise(teacher_logits: Tensor, *, power: float = 0.5) -> Tensor:
    r"""Logits whose softened prediction is a power of the teacher's, renormalised.

    .. math:: \tilde z = p \, z \quad\Rightarrow\quad
        \operatorname{softmax}(\tilde z / T) =
        \frac{\operatorname{softmax}(z / T)^p}{\sum_j \operatorname{softmax}(z / T)_j^p}

    The result is the same for every temperature T. A power below 1 makes the teacher's prediction flatter, one above 1
    sharper: for the teacher it is the temperature T / p, while the student and the factor T^2 keep T.

    Args:
        teacher_logits: z, shape ``(B, K)``.
        power: p > 0; 1 gives the logits back.

    Returns:
        Shape ``(B, K)``, on the device of ``teacher_logits``; float32, or float64 where the logits are.

    Raises:
        ArgumentError: not logits, or a power that is not above 0.

    Source: He, Wu, Wei, "Distilling Virtual Examples for Long-tailed Recognition" (DiVE), ICCV 2021,
    arXiv 2103.15042.
    """
    check_logits("teacher_logits", teacher_logits)
    return at_least_float32(teacher_logits) * check_number("power", power, above=0)
