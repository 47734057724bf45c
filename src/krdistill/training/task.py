"""What a training step is: images and labels in, named loss terms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from ..distributed import World, gather_rows, gather_step, share_sizes
from ..models.experts import Experts
from ..models.network import Network
from ..models.teacher import Teacher
from ..objective import Objective
from ..outputs import LossTerms, Outputs, Step


@dataclass(frozen=True)
class StepOutput:
    """A step's loss terms (per sample), the student's logits ``(B, K)`` and the labels ``(B,)``.

    With many processes they are about the whole batch, in every process.
    """

    terms: LossTerms
    logits: Tensor
    labels: Tensor


class Task(nn.Module):
    """A network to be trained, the objective it is trained with, and the teacher it may learn from.

    The teacher is no submodule: it is neither trained, nor saved, nor moved into checkpoints.

    Args:
        network: what is trained.
        objective: what it is trained with; its projectors are trained too.
        teacher: asked for every batch where the objective needs one and no stored answer is given.
    """

    def __init__(self, network: Network, objective: Objective, teacher: Teacher | Experts | None = None) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self._teacher = [teacher] if teacher is not None and objective.needs_teacher else []
        self._calls: list[nn.Module | None] = [None, None]  # compiled student and teacher: no submodules either
        self.precision = torch.float32  # of both networks' arithmetic where it can be lower; losses are float32
        self.world = World.alone()

    @property
    def teacher(self) -> Teacher | Experts | None:
        return self._teacher[0] if self._teacher else None

    def compile_networks(self, mode: str | None, *, teacher: bool) -> None:
        """Has torch.compile translate the networks where this task calls them; they themselves stay as they are.

        Every size of a batch is translated for itself: which translation a batch meets then depends on nothing that was
        seen before, and a training that goes on gives the numbers of one that was never stopped.

        Args:
            mode: of torch.compile; None takes it back.
            teacher: whether the teacher is asked in training, and so is worth it.
        """
        asked = (self.network, self.teacher if teacher else None) if mode is not None else (None, None)
        self._calls = [n if n is None else cast(nn.Module, torch.compile(n, mode=mode, dynamic=False)) for n in asked]

    def forward(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        index: Tensor | None = None,
        progress: float = 0.0,
        answer: Outputs | None = None,
        partners: Tensor | None = None,
        share: Tensor | float = 1.0,
        sizes: Sequence[int] | None = None,
    ) -> StepOutput:
        """Loss terms of a batch of images ``(B, C, H, W)``.

        Args:
            images: uint8, or float in [0, 1].
            labels: shape ``(B,)``.
            index: row numbers of the images in the training set, ``(B,)``.
            progress: share of the training that is done.
            answer: the teacher's stored answer; without one the teacher is asked.
            partners: for images mixed with others, the labels of those, ``(B,)``: every term is then taken for both
                labels.
            share: weight of ``labels`` in the mix, in [0, 1]; ``partners`` have the rest.
            sizes: with many processes, how many images of the whole batch each has; these are this one's.
        """
        maps, low = self.objective.needs_maps, self.precision != torch.float32
        with torch.autocast(images.device.type, dtype=self.precision, enabled=low):
            network, teacher = self._calls
            if answer is None and self.teacher is not None:
                answer = (self.teacher if teacher is None else teacher)(images, maps=maps)
            student = (self.network if network is None else network)(images, maps=maps)
        own = Step(_float32(student), labels, None if answer is None else _float32(answer), index, progress)
        if self.world.size == 1:
            whole, terms = own, self.objective(own)
        else:
            sizes = sizes if sizes is not None else share_sizes(len(labels) * self.world.size, self.world)
            gather = partial(gather_rows, sizes=sizes, world=self.world)
            whole = gather_step(own, sizes, self.world)
            terms = self.objective(whole, own=own, gather=gather)
        if partners is not None:
            if self.world.size == 1:
                other = self.objective(own._replace(labels=partners))
            else:
                mixed = whole._replace(labels=gather(partners))
                other = self.objective(mixed, own=own._replace(labels=partners), gather=gather)
            terms = terms.mixed(other, share)
        return StepOutput(terms, whole.student.logits.detach(), whole.labels)


def _float32(out: Outputs) -> Outputs:
    return Outputs(out.logits.float(), out.feature.float(), tuple(m.float() for m in out.maps))


def place(module: nn.Module, device: torch.device) -> None:
    """Moves a module to a device, its weights in channels-last order (faster for images on CPU and GPU)."""
    module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def best_device(name: str) -> torch.device:
    """The device of a name; ``auto`` is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
