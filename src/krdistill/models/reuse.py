"""A student that keeps the teacher's own classifier (SimKD)."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ModelError
from .assemble import assemble
from .network import Network
from .teacher import Teacher


def reuse_classifier(student: Network, teacher: Teacher, *, factor: int = 2, seed: int = 0) -> Network:
    """A student with a projector and a copy of the teacher's frozen classifier in place of its own head.

    Args:
        student: one of our networks; its stages are taken over.
        teacher: its last layer must be a plain linear one.
        factor: of the projector's bottleneck.
        seed: of the projector.

    Raises:
        ModelError: a student that is not one of ours, or a teacher with another head.
    """
    source = teacher.network.backbone.get_submodule(teacher.network.head_name)
    if student.architecture is None or type(source) is not nn.Linear:
        raise ModelError(
            "Reusing the teacher's classifier needs a student of krdistill's own and a linear teacher head."
        )
    architecture = {**student.architecture, "reuse": {"teacher_dim": source.in_features, "factor": factor}}
    backbone = assemble(architecture, seed=seed)
    head = backbone.head
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.weight.copy_(source.weight[teacher.order])
        head.bias.zero_() if source.bias is None else head.bias.copy_(source.bias[teacher.order])
    mean, std = student.mean.flatten().tolist(), student.std.flatten().tolist()
    return Network(
        backbone, class_names=student.class_names, mean=mean, std=std, kind=student.kind,
        image_size=student.image_size if student.kind == "image" else None, architecture=architecture,
    )  # fmt: skip
