"""LFME: experts of the class groups teach one student, each until the student has caught up with it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import at_least_float32, check_labels, check_logits, check_number, describe
from ..errors import ArgumentError
from ..priors import ClassGroups
from .cross_entropy import softmax_loss
from .kd import softened_divergence


class ExpertDistillation(nn.Module):
    r"""Self-paced distillation from one expert per group of classes.

    .. math:: \operatorname{CE}(v \, z_s, y) + \alpha \sum_e w_e \operatorname{KL}\big(\operatorname{softmax}(z_e / T)
        \,\|\, \operatorname{softmax}(z_{s,e} / T)\big)

    z_{s,e} are the student's logits of expert e's classes. An expert's weight w_e is 1 while the student's accuracy on
    the expert's classes is below ``threshold`` of the expert's, and falls to 0 where they are equal:
    :math:`\max(0, (1 - a_s / a_e) / (1 - \text{threshold}))`. An image's weight v rises from the expert's confidence in
    its label to 1 by the middle of the training.

    Args:
        groups: the classes' groups; a group of fewer than two classes has no expert, and its images have v = 1.
        temperature: T > 0.
        alpha: weight of the experts.
        threshold: see above, in [0, 1).
        momentum: of the running accuracies.

    Source: Xiang, Ding, Han, "Learning From Multiple Experts: Self-paced Knowledge Distillation for Long-tailed
    Classification", ECCV 2020, arXiv 2001.01536; constants from the authors' code.
    Deviation: the accuracies are running averages over training batches, where the authors measure them once per epoch
    on a validation set; images are not drawn by a curriculum.
    """

    index: Tensor
    accuracy: Tensor

    def __init__(
        self,
        groups: ClassGroups,
        *,
        temperature: float = 2.0,
        alpha: float = 1.0,
        threshold: float = 0.3,
        momentum: float = 0.99,
    ) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, above=0)
        self.alpha = check_number("alpha", alpha, at_least=0)
        self.threshold = check_number("threshold", threshold, at_least=0, below=1)
        self.momentum = check_number("momentum", momentum, at_least=0, below=1)
        members = [groups.members(name) for name in groups.names]
        self.experts = [i for i, m in enumerate(members) if len(m) >= 2]
        if not self.experts:
            raise ArgumentError("groups: expected a group of at least two classes for an expert, but got none.")
        for i in self.experts:
            self.register_buffer(f"members_{i}", members[i])
        self.register_buffer("index", groups.index.clone())
        self.register_buffer("accuracy", torch.zeros(2, len(groups.names)))  # the student's, the experts'

    def members(self, expert: int) -> Tensor:
        """Class indices of an expert."""
        return self.get_buffer(f"members_{expert}")

    def expert_weights(self) -> Tensor:
        """w_e of every group, ``(G,)``; 0 for a group without an expert."""
        student, expert = self.accuracy
        ratio = student / expert.clamp_min(1e-6)
        weights = ((1 - ratio) / (1 - self.threshold)).clamp(0, 1)
        return torch.where(expert > 0, weights, torch.ones_like(weights))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, progress: float = 0.0) -> Tensor:
        """Student's and experts' logits ``(B, K)`` (each expert's in the columns of its classes) to ``(B,)``."""
        check_logits("student_logits", student_logits, columns=len(self.index))
        check_logits("teacher_logits", teacher_logits, rows=len(student_logits), columns=len(self.index))
        labels = check_labels(labels, len(student_logits), len(self.index))
        said = at_least_float32(student_logits)
        told = at_least_float32(teacher_logits.detach())
        if not isinstance(progress, float | int):
            raise ArgumentError(f"progress: expected a number in [0, 1], but got {describe(progress)}.")
        group = self.index[labels]
        if self.training:
            self._update(said.detach(), told, labels, group)
        start = self._confidence(told, labels, group)
        scale = start + (1 - start) * min(1.0, 2 * progress)
        loss = softmax_loss(said, labels, scale=scale.unsqueeze(1))
        weights = self.expert_weights() * (self.alpha / self.temperature**2)  # the kernel gives T^2 KL
        for e in self.experts:
            classes = self.members(e)
            pulled = softened_divergence(said[:, classes], told[:, classes], self.temperature, owned=True)
            loss = loss + weights[e] * pulled
        return loss

    def _confidence(self, told: Tensor, labels: Tensor, group: Tensor) -> Tensor:
        """How sure of its label each image's own expert is, ``(B,)``; 1 where there is none."""
        start = torch.ones_like(told[:, 0])
        for e in self.experts:
            classes = self.members(e)
            expert = told[:, classes]
            position = torch.searchsorted(classes, labels).clamp_max(len(classes) - 1).unsqueeze(1)
            confidence = (expert.gather(1, position) - expert.logsumexp(1, keepdim=True)).exp().squeeze(1)
            start = torch.where(group == e, confidence, start)
        return start

    @torch.no_grad()
    def _update(self, said: Tensor, told: Tensor, labels: Tensor, group: Tensor) -> None:
        right = torch.zeros(2, len(self.accuracy[0]), device=said.device)
        number = torch.zeros(len(self.accuracy[0]), device=said.device)
        right[0].index_add_(0, group, (said.argmax(1) == labels).float())
        for e in self.experts:
            classes = self.members(e)
            answered = (classes[told[:, classes].argmax(1)] == labels) & (group == e)
            right[1, e] = answered.float().sum()
        number.index_add_(0, group, torch.ones_like(group, dtype=torch.float32))
        measured = right / number.clamp_min(1)
        first = self.accuracy[1] == 0
        kept = torch.where(first, torch.zeros_like(number), torch.full_like(number, self.momentum))
        new = kept * self.accuracy + (1 - kept) * measured
        self.accuracy.copy_(torch.where(number > 0, new, self.accuracy))
