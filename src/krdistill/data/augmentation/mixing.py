"""mixup: images mixed in pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import check_number, describe, readable
from ...errors import ArgumentError
from ...rng import generator
from .base import from_pixels, to_pixels


class Mixed(NamedTuple):
    """A mixed batch.

    Attributes:
        images: float32 in [0, 1], ``(B, C, H, W)``.
        partner: the row of the image that each was mixed with, int64, ``(B,)``, a permutation.
        lam: the share of the image itself, in [0, 1]; ``1 - lam`` is its partner's.
    """

    images: Tensor
    partner: Tensor
    lam: float


def mixup(images: Tensor, *, alpha: float, seed: int, epoch: int, step: int) -> Mixed:
    r"""Every image mixed with another one of the batch.

    .. math:: x_i \leftarrow \lambda x_i + (1 - \lambda) x_{\sigma(i)}, \qquad
        \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    with one :math:`\lambda` and one permutation :math:`\sigma` for the batch. The loss is to be mixed the same way, for
    the labels ``y`` and ``y[partner]``.

    Args:
        images: ``(B, C, H, W)``, uint8, or floating point in [0, 1].
        alpha: > 0. Small values leave most images nearly as they are; 1 draws the share uniformly.
        seed: the run's seed.
        epoch: the epoch.
        step: the step within the epoch. Unlike the augmentations, mixup depends on the batch, by its very nature.

    Returns:
        Images, on the device of ``images``, contiguous where that is, else channels-last; partners; the share.

    Raises:
        ArgumentError: ``alpha`` is not a positive number, or ``images`` is of another dtype, shape or range.

    Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412.
    """
    from scipy.special import betaincinv

    check_number("alpha", alpha, above=0)
    _check(images)
    gen = generator(seed, "mixup", epoch, step)
    # By the inverse of the distribution function: one uniform number, so that lam does not depend on the batch's size.
    lam = float(betaincinv(alpha, alpha, float(torch.rand((), generator=gen, dtype=torch.float64, device="cpu"))))
    partner = torch.randperm(len(images), generator=gen, device="cpu").to(images.device)
    pixels = to_pixels(images)
    own = pixels.to(torch.float32)
    if images.dtype == torch.uint8:
        own = own / 255
    return Mixed(from_pixels(torch.lerp(own.index_select(0, partner), own, lam), like=images), partner, lam)


def _check(images: Any) -> None:
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or not (images.dtype == torch.uint8 or images.is_floating_point())
    ):
        raise ArgumentError(
            f"images: expected (B, C, H, W), uint8 or floating point in [0, 1], but got {describe(images)}."
        )
    if images.is_floating_point() and readable(images):
        low, high = (float(v) for v in images.aminmax())
        if not 0 <= low <= high <= 1:
            raise ArgumentError(
                f"images: expected floating-point values in [0, 1], but got {low:g} to {high:g}. "
                "Mix before normalisation, or give uint8."
            )
