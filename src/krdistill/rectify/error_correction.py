"""Error correction: where the teacher is wrong, the true class is put on top of its prediction."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .._checks import check_choice, check_labels, check_logits

CORRECTIONS = ("lift", "swap", "none")


def errors(logits: Tensor, labels: Tensor) -> Tensor:
    """Where the largest logit is not the label's.

    Args:
        logits: shape ``(B, K)``.
        labels: shape ``(B,)``.

    Returns:
        Shape ``(B,)``, bool. A label that ties with the largest logit is no error.

    Raises:
        ArgumentError: shapes or labels that do not fit.
    """
    labels = check_labels(labels, check_logits("logits", logits).shape[0], logits.shape[1])
    return logits.gather(1, labels.unsqueeze(1)).squeeze(1) < logits.amax(1)


def correct_errors(logits: Tensor, labels: Tensor, mode: Literal["lift", "swap", "none"] = "lift") -> Tensor:
    r"""Logits whose largest is always the label's.

    Where :math:`\arg\max z \ne y`, with the winner w:

    - ``lift``: :math:`z_y \leftarrow z_w`; the others keep their values, so the label ties with the winner and the
      teacher's doubt remains;
    - ``swap``: :math:`z_y` and :math:`z_w` trade places, so the set of values, and with it the entropy, remains;
    - ``none``: nothing.

    Rows that are right are returned bit for bit.

    Args:
        logits: shape ``(B, K)``; usually with the prior already removed.
        labels: shape ``(B,)``.
        mode: see above.

    Returns:
        Shape ``(B, K)``, dtype and device of ``logits`` (values only change places, so half precision stays exact).

    Raises:
        ArgumentError: shapes or labels that do not fit, or an unknown mode.

    Source: Wen, Lai, Qian, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", 2019,
    arXiv 1911.07471 (probability shift, here ``swap``). ``lift`` is ours.
    """
    check_choice("mode", mode, CORRECTIONS)
    labels = check_labels(labels, check_logits("logits", logits).shape[0], logits.shape[1])
    if mode == "none":
        return logits
    column = labels.unsqueeze(1)
    true = logits.gather(1, column)
    top, winner = logits.max(1, keepdim=True)
    # Where the label is at the top already, its value is the top's, and what is written is what stands there.
    if mode == "swap":
        return logits.scatter(1, winner, true).scatter_(1, column, top)
    return logits.scatter(1, column, top)
