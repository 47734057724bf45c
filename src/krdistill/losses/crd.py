"""Contrastive representation distillation (CRD): the student's feature must tell its image's teacher feature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .._checks import (
    at_least_float32,
    check_integer,
    check_labels,
    check_matrix,
    check_number,
    describe,
    readable,
)
from ..errors import ArgumentError, DataError
from ..rectify.anchor_rectification import unit_rows
from ..rng import generator, uniform

_GIB = 1 << 30
_PIECE = 32 << 20  # bytes that are worked on at once


def nce_loss(scores: Tensor, num_samples: int) -> Tensor:
    r"""Noise-contrastive estimation: which of m + 1 scores is that of the true pair.

    .. math:: -\log h(s_0) - \sum_{i=1}^{m} \log(1 - h(s_i)), \qquad
        h(s) = \frac{e^s}{e^s + m P_n}, \qquad P_n = 1 / N

    Args:
        scores: s, logarithms of unnormalised-model probabilities, shape ``(B, 1 + m)``, the true pair first.
        num_samples: N, over which the noise is uniform.

    Returns:
        Shape ``(B,)``; float32, or float64 where the scores are. In log-space: h is a sigmoid of s - log(m / N).

    Raises:
        ArgumentError: scores of fewer than two columns, or N below 1.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.
    """
    check_matrix("scores", scores, "(B, 1 + m)")
    if scores.shape[1] < 2:
        raise ArgumentError(f"scores: expected one true pair and at least one negative, but got {describe(scores)}.")
    N = check_integer("num_samples", num_samples, at_least=1)
    odds = at_least_float32(scores) - math.log((scores.shape[1] - 1) / N)
    return F.softplus(-odds[:, 0]) + F.softplus(odds[:, 1:]).sum(1)


class ContrastiveRepresentationDistillation(nn.Module):
    r"""Student and teacher features of the same image are told from those of images of other classes.

    Both features go through a learned linear embedding to d dimensions and are scaled to length 1. Each network has a
    memory bank with one embedding per training image. The student's embedding is scored against the teacher's bank,
    and the other way round:

    .. math:: s_i = \frac{e^\top M_i}{\tau} - \log Z, \qquad \text{loss} = \text{NCE}_s + \text{NCE}_t

    with :func:`nce_loss`, the image itself as the true pair and m negatives. log Z is set once, on the first batch of
    training, so that the mean of the e^s is 1 / N, and then stays. After the loss, in training mode only, the banks
    follow: :math:`M \leftarrow \operatorname{norm}(\rho M + (1 - \rho) e)`.

    The supervised form: negatives are images of *other classes*, each equally likely, drawn with replacement, so m may
    exceed their number. Each draw depends on the seed, the number of training batches so far and the image, and on
    nothing else: neither on the batch around it nor on the device.

    A batch is worked on some rows at a time, in at most about 32 MiB (or one row, where that is more), and leaves for
    backward no more than the gradient by the embeddings, which is known in forward.

    Embeddings and banks are drawn from ``seed``; the global generator is not used.

    Args:
        student_dim: D_s.
        teacher_dim: D_t.
        num_samples: N, the number of training images.
        labels: of all training images, shape ``(N,)``, in the order that ``index`` counts in.
        embed_dim: d.
        negatives: m.
        temperature: tau > 0.
        momentum: rho, in [0, 1).
        seed: for embeddings, banks and negatives.
        max_bytes: refuse to hold, or to work on, more memory than this by :meth:`estimate_bytes`; by default 4 GiB.

    Raises:
        ArgumentError: arguments that do not fit, or more memory than ``max_bytes``, before any of it is taken.
        DataError: all images of one class, so that there are no negatives.

    Source: Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699.
    Deviation: the public code draws without replacement where it can. It gathers m + 1 bank rows per image; we
    score the whole bank and pick, which is the same and takes far less memory. Banks start at random directions of
    exact length 1. Of an image that is twice in a batch, the bank takes the mean embedding. log Z for each side is
    kept apart, as there.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor
    step: Tensor
    labels: Tensor
    order: Tensor
    starts: Tensor
    sizes: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        labels: Tensor,
        *,
        embed_dim: int = 128,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        seed: int = 0,
        max_bytes: int = 4 * _GIB,
    ) -> None:
        super().__init__()
        student_dim = check_integer("student_dim", student_dim, at_least=1)
        teacher_dim = check_integer("teacher_dim", teacher_dim, at_least=1)
        self.num_samples = N = check_integer("num_samples", num_samples, at_least=2)
        self.embed_dim = d = check_integer("embed_dim", embed_dim, at_least=1)
        self.negatives = check_integer("negatives", negatives, at_least=1)
        self.temperature = check_number("temperature", temperature, above=0)
        self.momentum = check_number("momentum", momentum, at_least=0, below=1)
        self.seed = check_integer("seed", seed, at_least=0)
        self.max_bytes = check_integer("max_bytes", max_bytes, at_least=1)
        self._refuse_memory(0)
        if isinstance(labels, Tensor):
            labels = labels.cpu()
        labels = check_labels(labels, N, 1 << 31)
        sizes = torch.bincount(labels)
        if int(sizes.max()) == N:
            raise DataError("labels: expected images of at least 2 classes, but got one: there are no negatives.")

        draw = generator(self.seed, "crd")
        self.embed_student = _linear(student_dim, d, draw)
        self.embed_teacher = _linear(teacher_dim, d, draw)
        self.register_buffer("student_memory", unit_rows(torch.randn(N, d, generator=draw)))
        self.register_buffer("teacher_memory", unit_rows(torch.randn(N, d, generator=draw)))
        self.register_buffer("log_z", torch.full((2,), math.nan))  # NaN: not set yet
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        # the images sorted by class, so that "any but class c" is an interval cut out
        self.register_buffer("labels", labels.clone(), persistent=False)
        self.register_buffer("order", labels.argsort(stable=True), persistent=False)
        self.register_buffer("starts", sizes.cumsum(0) - sizes, persistent=False)
        self.register_buffer("sizes", sizes, persistent=False)

    @staticmethod
    def estimate_bytes(num_samples: int, embed_dim: int, batch_size: int, negatives: int) -> int:
        """About how much memory the loss takes at its peak.

        Args:
            num_samples: N.
            embed_dim: d.
            batch_size: B; 0 for what is held between the batches alone.
            negatives: m.

        Returns:
            Bytes: two banks in float32 and two indices of the images; in a training step also the embeddings of the
            batch with their gradients, and for the rows that are worked on at once the scores against the banks, the
            drawn negatives and the picked scores with their temporaries.
        """
        N, d = check_integer("num_samples", num_samples, at_least=1), check_integer("embed_dim", embed_dim, at_least=1)
        B, m = check_integer("batch_size", batch_size, at_least=0), check_integer("negatives", negatives, at_least=1)
        held = 2 * N * d * 4 + 2 * N * 8
        return held + B * d * 32 + _rows_at_once(N, m, B) * _row_bytes(N, m)

    def _refuse_memory(self, batch_size: int) -> None:
        needed = self.estimate_bytes(self.num_samples, self.embed_dim, batch_size, self.negatives)
        if needed > self.max_bytes:
            what = f"a batch of {batch_size} with {self.negatives} negatives" if batch_size else "the memory banks"
            raise ArgumentError(
                f"max_bytes: {what} for {self.num_samples} images in {self.embed_dim} dimensions would take about "
                f"{needed / _GIB:.2f} GiB, more than the {self.max_bytes / _GIB:.2f} GiB allowed. Lower embed_dim"
                f"{', negatives or the batch size' if batch_size else ''}, or raise max_bytes."
            )

    def draw_negatives(self, labels: Tensor, index: Tensor) -> Tensor:
        """The images that each image is told from in the coming batch.

        Args:
            labels: shape ``(B,)``.
            index: which training images they are, shape ``(B,)``.

        Returns:
            Shape ``(B, m)``, int64: training images of other classes.
        """
        share = uniform(self.seed, "crd negatives", 0, self.step * self.num_samples + index, self.negatives)
        start, size = self.starts[labels].unsqueeze(1), self.sizes[labels].unsqueeze(1)
        # whole-number arithmetic on the 24 random bits: no rounding, and no float64, which not every device has
        place = (share * (1 << 24)).long() * (self.num_samples - size) >> 24
        return self.order[place + size * (place >= start)]

    def forward(self, student_features: Tensor, teacher_features: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch; in training mode the memory banks follow.

        Args:
            student_features: shape ``(B, D_s)``.
            teacher_features: shape ``(B, D_t)``; no gradient flows to them, but one to their embedding.
            labels: shape ``(B,)``; as given for these images at first (checked on the CPU): a mixed label has no place
                here.
            index: which training images they are, shape ``(B,)``, in ``[0, N)``.

        Returns:
            Shape ``(B,)``, float32 at least, under autocast too. Features that are not finite give a loss that is not,
            and never enter the banks.

        Raises:
            ArgumentError: shapes, labels or indices that do not fit, no rows, or more memory than ``max_bytes``.
        """
        check_matrix("student_features", student_features, "(B, D_s)", columns=self.embed_student.in_features)
        B = student_features.shape[0]
        if not B:
            raise ArgumentError("student_features: expected at least one row, but got none. Leave empty batches out.")
        check_matrix("teacher_features", teacher_features, "(B, D_t)", rows=B, columns=self.embed_teacher.in_features)
        labels = check_labels(labels, B, len(self.sizes))
        index = self._check_index(index, labels)
        self._refuse_memory(B)
        weight = self.embed_student.weight.dtype
        e_s = unit_rows(at_least_float32(self.embed_student(student_features.to(weight))))
        e_t = unit_rows(at_least_float32(self.embed_teacher(teacher_features.detach().to(weight))))
        with torch.autocast(e_s.device.type, enabled=False):
            losses, slopes, log_z = self._contrast(e_s.detach(), e_t.detach(), labels, index)
            loss = sum(
                _WithSlope.apply(e, value, slope) for e, value, slope in zip((e_s, e_t), losses, slopes, strict=True)
            )
            if self.training:
                self._follow(e_s.detach(), e_t.detach(), index, log_z)
        assert isinstance(loss, Tensor)
        return loss

    def _check_index(self, index: Tensor, labels: Tensor) -> Tensor:
        if (
            not isinstance(index, Tensor)
            or index.is_floating_point()
            or index.is_complex()
            or index.dtype == torch.bool
            or index.shape != labels.shape
        ):
            raise ArgumentError(
                f"index: expected an integer tensor of shape {tuple(labels.shape)}, the training images' numbers, "
                f"but got {describe(index)}."
            )
        if readable(index) and readable(self.labels):
            low, high = int(index.min()), int(index.max())
            if low < 0 or high >= self.num_samples:
                raise ArgumentError(
                    f"index: expected image numbers in 0..{self.num_samples - 1}, but got {low if low < 0 else high}."
                )
            wrong = self.labels[index.long()] != labels
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ArgumentError(
                    f"index: image {int(index[row])} has label {int(self.labels[index[row]])}, but row {row} came with "
                    f"label {int(labels[row])}. Labels and index must be those of the training set, in its order."
                )
        return index.long()

    def _pieces(self, e_s: Tensor, e_t: Tensor, labels: Tensor, index: Tensor) -> Iterator[_Piece]:
        """Both sides' scores, some rows of the batch at a time."""
        step = _rows_at_once(self.num_samples, self.negatives, len(index))
        banks = [memory.to(e_s.dtype) for memory in (self.teacher_memory, self.student_memory)]
        for rows in (slice(start, start + step) for start in range(0, len(index), step)):
            chosen = torch.cat([index[rows].unsqueeze(1), self.draw_negatives(labels[rows], index[rows])], dim=1)
            for side, (embedding, bank) in enumerate(zip((e_s, e_t), banks, strict=True)):
                whole = embedding[rows] @ bank.T
                yield _Piece(side, rows, chosen, whole.gather(1, chosen).div_(self.temperature), whole, bank)

    def _contrast(self, e_s: Tensor, e_t: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Both sides' losses ``(2, B)``, their gradients by the embeddings, and both log Z as they should be now."""
        log_z = self.log_z.to(e_s.dtype)
        if bool(log_z.isnan().any()):  # such that the batch's mean of e^s is 1 / N
            sums = e_s.new_empty(2, len(index))
            for piece in self._pieces(e_s, e_t, labels, index):
                sums[piece.side, piece.rows] = piece.scores.logsumexp(1)
            first = sums.logsumexp(1) - math.log(len(index) * (self.negatives + 1) / self.num_samples)
            log_z = torch.where(log_z.isnan(), first, log_z)
        losses, slopes = e_s.new_empty(2, len(index)), [torch.empty_like(e_s), torch.empty_like(e_t)]
        for side, rows, chosen, scores, whole, bank in self._pieces(e_s, e_t, labels, index):
            losses[side, rows] = nce_loss(scores.sub_(log_z[side]), self.num_samples)
            # h of the negatives, and h - 1 of the true pair: written as -h(-odds), it keeps its digits near 0
            odds = scores.sub_(math.log(self.negatives / self.num_samples))
            odds[:, 0].neg_()
            weights = odds.sigmoid_().div_(self.temperature)
            weights[:, 0].neg_()
            torch.mm(whole.zero_().scatter_add_(1, chosen, weights), bank, out=slopes[side][rows])
        return losses, slopes, log_z

    @torch.no_grad()
    def _follow(self, e_s: Tensor, e_t: Tensor, index: Tensor, log_z: Tensor) -> None:
        self.log_z.copy_(log_z)
        self.step += 1
        same = index.unsqueeze(0) == index.unsqueeze(1)
        for memory, e in ((self.student_memory, e_s), (self.teacher_memory, e_t)):
            sound = torch.isfinite(e).all(1)
            share = (same & sound).to(e.dtype)
            number = share.sum(1, keepdim=True)
            mean = share @ torch.where(sound.unsqueeze(1), e, torch.zeros_like(e)) / number.clamp_min(1)
            old = memory[index].to(e.dtype)
            new = unit_rows(self.momentum * old + (1 - self.momentum) * mean)
            memory.index_copy_(0, index, torch.where(number > 0, new, old).to(memory.dtype))

    def extra_repr(self) -> str:
        return (
            f"num_samples={self.num_samples}, embed_dim={self.embed_dim}, negatives={self.negatives}, "
            f"temperature={self.temperature}, momentum={self.momentum}"
        )


class _Piece(NamedTuple):
    """One side's scores of some rows: those of the chosen images, and those of the whole bank as working space."""

    side: int
    rows: slice
    chosen: Tensor
    scores: Tensor
    whole: Tensor
    bank: Tensor


class _WithSlope(torch.autograd.Function):
    """Values ``(B,)`` of a function of rows ``(B, d)`` whose gradient by each row is known."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad.unsqueeze(1), None, None


def _row_bytes(num_samples: int, negatives: int) -> int:
    """What one row of a batch takes: two sides' scores, and its negatives while they are drawn."""
    return num_samples * 8 + (negatives + 1) * 64


def _rows_at_once(num_samples: int, negatives: int, batch_size: int) -> int:
    return min(batch_size, max(1, _PIECE // _row_bytes(num_samples, negatives)))


def _linear(inside: int, outside: int, draw: torch.Generator) -> nn.Linear:
    """A linear layer as :class:`torch.nn.Linear` draws it, from a generator of its own."""
    layer = nn.utils.skip_init(nn.Linear, inside, outside)
    bound = 1 / math.sqrt(inside)
    nn.init.uniform_(layer.weight, -bound, bound, generator=draw)
    nn.init.uniform_(layer.bias, -bound, bound, generator=draw)
    return layer
