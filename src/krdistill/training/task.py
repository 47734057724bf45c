"""What a training step is: images and labels in, named loss terms out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.experts import Experts
from ..models.network import Network
from ..models.teacher import Teacher
from ..objective import Objective
from ..outputs import LossTerms, Outputs, Step


@dataclass(frozen=True)
class StepOutput:
    """A step's loss terms (per sample) and the student's logits ``(B, K)``."""

    terms: LossTerms
    logits: Tensor


class Task(nn.Module):
    """A network to be trained, the objective it is trained with, and the teacher it may learn from.

    The teacher is no submodule: it is neither trained, nor saved, nor moved into checkpoints.

    Args:
        network: what is trained.
        objective: what it is trained with; its projectors are trained too.
        teacher: asked for every batch where the objective needs one.
    """

    def __init__(self, network: Network, objective: Objective, teacher: Teacher | Experts | None = None) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self._teacher = [teacher] if teacher is not None and objective.needs_teacher else []

    @property
    def teacher(self) -> Teacher | Experts | None:
        return self._teacher[0] if self._teacher else None

    def forward(
        self, images: Tensor, labels: Tensor, *, index: Tensor | None = None, progress: float = 0.0
    ) -> StepOutput:
        """Loss terms of a batch of images ``(B, C, H, W)``.

        Args:
            images: uint8, or float in [0, 1].
            labels: shape ``(B,)``.
            index: row numbers of the images in the training set, ``(B,)``.
            progress: share of the training that is done.
        """
        step = self._ask(images, labels, index, progress)
        return StepOutput(self.objective(step), step.student.logits.detach())

    def mixed(
        self,
        images: Tensor,
        labels: Tensor,
        partners: Tensor,
        share: Tensor | float,
        *,
        index: Tensor | None = None,
        progress: float = 0.0,
    ) -> StepOutput:
        """The step for images mixed with others: every term for both labels, by their shares.

        Args:
            images: mixed images ``(B, C, H, W)``.
            labels: labels of the images with weight ``share``, ``(B,)``.
            partners: labels of the images with weight ``1 - share``, ``(B,)``.
            share: in [0, 1].
            index: as in :meth:`forward`.
            progress: as in :meth:`forward`.
        """
        step = self._ask(images, labels, index, progress)
        own, other = self.objective(step), self.objective(step._replace(labels=partners))
        return StepOutput(own.mixed(other, share), step.student.logits.detach())

    def _ask(self, images: Tensor, labels: Tensor, index: Tensor | None, progress: float) -> Step:
        maps = self.objective.needs_maps
        answer: Outputs | None = self.teacher(images, maps=maps) if self.teacher is not None else None
        return Step(self.network(images, maps=maps), labels, answer, index, progress)


def place(module: nn.Module, device: torch.device) -> None:
    """Moves a module to a device, its weights in channels-last order (faster for images on CPU and GPU)."""
    module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def best_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
