"""Li, Wang, Wu, "Self Supervision to Distillation for Long-Tailed Visual Recognition", ICCV 2021, arXiv 2109.04075."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from .base import Options, Recipe, Source

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext


class SSDOptions(Options):
    """Options of SSD; the classification loss is that of the hard head, which is not kept.

    Attributes:
        logit_weight: weight of the soft head's distillation.
        temperature: of it.
        scale_epochs: epochs of the teacher's second stage, in which it learns one scale per class.
    """

    logit_weight: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=2.0, gt=0)
    scale_epochs: int = Field(default=5, ge=1)


def build(options: SSDOptions, context: ObjectiveContext) -> Objective:
    from ..errors import ConfigError, ModelError
    from ..losses.ssd import AuxiliaryHead, ScaledTeacherDistillation
    from ..objective import Objective, Term, on_logits, on_student_feature
    from ..rectify.second_stage import lws
    from ..rng import derive_seed, forked

    if options.classification != "cross-entropy":
        raise ConfigError(f"recipe ssd: its hard head learns by cross-entropy, got {options.classification!r}.")
    teacher = context.require_teacher("SSD")
    head = context.teacher_head
    if head is None:
        raise ModelError("SSD re-scales the teacher's last linear layer, got a teacher without one.")
    scales = lws(
        head.weight.detach(),
        head.bias.detach() if head.bias is not None else None,
        teacher.features,
        teacher.labels,
        epochs=options.scale_epochs,
        seed=derive_seed(context.seed, "ssd") % 2**31,
    )
    with forked(context.seed, "hard-head"):
        hard = AuxiliaryHead(context.student_dim, context.prior.num_classes)
    soft = ScaledTeacherDistillation(scales.float(), temperature=options.temperature)
    return Objective(
        [
            Term("classification", hard, on_student_feature, weight=options.classification_weight),
            Term("ssd", soft, on_logits, weight=options.logit_weight),
        ]
    )


RECIPES = (
    Recipe(
        name="ssd",
        summary="a teacher re-scaled class by class teaches the soft head; a hard head learns the labels",
        source=Source("Self Supervision to Distillation for Long-Tailed Visual Recognition", 2021, "2109.04075"),
        needs=frozenset({"teacher", "counts", "features", "two stages"}),
        options=SSDOptions,
        defaults_from="the authors' code: T 2, weights 1 / 1, 5 epochs of scales; no self-supervised first stage",
        build=build,
    ),
)
