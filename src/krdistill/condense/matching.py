"""Distribution matching: synthetic images that random networks embed where they embed the real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_integer, check_number
from ..errors import ArgumentError, DataError
from ..rng import forked, generator
from .selection import in_turn

_ROWS = 1024  # images embedded at once
_JITTER = 0.1  # of the copies that a small class starts from, in standard deviations of its pixels


class ConvNet(nn.Module):
    """Blocks of convolution 3x3, instance normalisation, ReLU and average pooling by 2; what is left is the embedding.

    Two blocks up to 31 pixels a side, three from 32, four from 64, and so on.

    Args:
        channels: of the images.
        side: their shorter side in pixels, at least 4.
        width: channels of every block.

    Source: Gidaris, Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018, arXiv 1804.09458; the
    network of dataset condensation.
    """

    def __init__(self, channels: int, side: int, width: int = 128) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for i in range(max(2, int(math.log2(side)) - 2)):
            convolution = nn.Conv2d(channels if i == 0 else width, width, 3, padding=1)
            blocks += [convolution, nn.GroupNorm(width, width), nn.ReLU(), nn.AvgPool2d(2)]
        self.blocks = nn.Sequential(*blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``(B, C, H, W)`` to embeddings ``(B, D)``."""
        embedded: Tensor = self.blocks(images).flatten(1)
        return embedded


def mean_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    r"""How far apart the mean embeddings of every class are.

    .. math:: L = \sum_k \lVert \operatorname{mean}_i r_{ki} - \operatorname{mean}_j s_{kj} \rVert^2

    Args:
        real: mean embeddings of the real images, shape ``(K, D)``.
        synthetic: embeddings of the synthetic ones, shape ``(K, n, D)``.

    Returns:
        A scalar.
    """
    return (real - synthetic.mean(1)).square().sum()


def draw_views(number: int, *, flip: bool, gen: torch.Generator) -> dict[str, Tensor]:
    """One differentiable augmentation for each of so many classes: shift, scale, turn, (flip,) hole or colours.

    Args:
        number: of classes.
        flip: whether a horizontal flip is among them; it would change the class of digits and characters.
        gen: where the draws come from.

    Returns:
        ``matrix`` ``(number, 2, 3)`` for ``affine_grid``, ``brightness`` (added), ``saturation`` and ``contrast``
        (factors) ``(number,)``, ``hole`` ``(number, 2)``: its centre in shares of the side, NaN where there is none.

    Source: Zhao, Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021, arXiv 2102.08259:
    one of colour, crop, cutout, flip, scale, rotate at a time, the same for real and synthetic images; its strengths
    (shift 1/8 of the side, hole 1/2, scale up to 1.2, 15 degrees).
    """
    kinds = ["colour", "crop", "cutout", "scale", "rotate", *(["flip"] if flip else [])]
    which = torch.randint(len(kinds), (number,), generator=gen)
    u = torch.rand(number, 5, generator=gen)

    def chosen(kind: str) -> Tensor:
        return which == kinds.index(kind) if kind in kinds else torch.zeros(number, dtype=torch.bool)

    one, zero = torch.ones(number), torch.zeros(number)
    angle = torch.where(chosen("rotate"), (2 * u[:, 0] - 1) * math.radians(15), zero)
    size = 1.2 ** (2 * u[:, :2] - 1)  # 1 / 1.2 to 1.2, of width and height
    across = torch.where(chosen("scale"), size[:, 0], one) * torch.where(chosen("flip") & (u[:, 2] < 0.5), -one, one)
    along = torch.where(chosen("scale"), size[:, 1], one)
    shift = torch.where(chosen("crop").unsqueeze(1), (2 * u[:, :2] - 1) / 4, torch.zeros(number, 2))  # the side is 2
    sine, cosine = angle.sin(), angle.cos()
    matrix = torch.stack(
        [
            torch.stack([across * cosine, -along * sine, shift[:, 0]], 1),
            torch.stack([across * sine, along * cosine, shift[:, 1]], 1),
        ],
        1,
    )
    colour = chosen("colour")
    return {
        "matrix": matrix,
        "brightness": torch.where(colour, u[:, 2] - 0.5, zero),
        "saturation": torch.where(colour, 2 * u[:, 3], one),
        "contrast": torch.where(colour, u[:, 4] + 0.5, one),
        "hole": torch.where(chosen("cutout").unsqueeze(1), u[:, :2], torch.full((number, 2), torch.nan)),
    }


def augment(images: Tensor, views: Mapping[str, Tensor], index: Tensor) -> Tensor:
    """Differentiable views of images.

    Args:
        images: normalised, shape ``(B, C, H, W)``, floating point.
        views: what :func:`draw_views` drew.
        index: which of them each image gets, shape ``(B,)``, int64.

    Returns:
        The same shape. What comes in from outside an image is 0, its mean colour.
    """
    views = {name: value.to(images.device, images.dtype)[index] for name, value in views.items()}

    def each(name: str) -> Tensor:
        return views[name].reshape(-1, 1, 1, 1)

    x = images + each("brightness")
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * each("saturation") + grey if images.shape[1] > 1 else x
    middle = x.mean((1, 2, 3), keepdim=True)
    x = (x - middle) * each("contrast") + middle
    grid = F.affine_grid(views["matrix"], list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
    H, W = x.shape[2:]
    rows = (torch.arange(H, device=x.device, dtype=x.dtype) + 0.5) / H
    columns = (torch.arange(W, device=x.device, dtype=x.dtype) + 0.5) / W
    inside = ((rows - views["hole"][:, :1]).abs() < 0.25).unsqueeze(2)
    inside = inside & ((columns - views["hole"][:, 1:]).abs() < 0.25).unsqueeze(1)  # NaN is never near
    return x.masked_fill(inside.unsqueeze(1), 0.0)


def start_images(
    normalised: Callable[[Tensor], Tensor], members: Sequence[Tensor], ipc: int, *, seed: int = 0
) -> Tensor:
    """Real images to start from, ``ipc`` of every class; a class with fewer gives them again with a little noise.

    Two copies under the same loss would stay copies for ever.

    Args:
        normalised: gives images by row number, shape ``(B, C, H, W)``.
        members: the row numbers of every class, none of them empty.
        ipc: images per class.
        seed: which ones, and of the noise.

    Returns:
        Shape ``(K, ipc, C, H, W)``, float32.
    """
    made = []
    for k, rows in enumerate(members):
        gen = generator(seed, "condense", k)
        x = normalised(in_turn(rows[torch.randperm(len(rows), generator=gen)], ipc))
        x[len(rows) :] += _JITTER * torch.randn(x[len(rows) :].shape, generator=gen)
        made.append(x)
    return torch.stack(made)


def match_distributions(
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    ipc: int,
    *,
    iterations: int = 2000,
    lr: float = 1.0,
    momentum: float = 0.5,
    real_batch: int = 256,
    width: int = 128,
    flip: bool = True,
    seed: int = 0,
    device: torch.device | None = None,
    state: Mapping[str, Any] | None = None,
    on_step: Callable[[int, int, Callable[[], dict[str, Any]]], None] | None = None,
) -> tuple[Tensor, list[float]]:
    r"""Synthetic images, whose embeddings by random networks have the class means of the real ones.

    In every step one network :math:`\psi` is drawn anew and, for every class, one augmentation :math:`A_k`, and the
    pixels of S follow the gradient of

    .. math:: \sum_k \Big\lVert \operatorname{mean}_{x \in B_k} \psi(A_k(x)) - \operatorname{mean}_{s \in S_k}
        \psi(A_k(s)) \Big\rVert^2

    with SGD on pixels normalised by the channels' mean and standard deviation.

    Args:
        images: the real ones, uint8, shape ``(N, H, W, C)``; rows are taken when they are needed.
        labels: shape ``(N,)``, int64; every class has an image.
        num_classes: K.
        ipc: synthetic images per class.
        iterations: steps; the source takes 20,000.
        lr: learning rate of the pixels, in their standard deviations.
        momentum: of SGD.
        real_batch: real images of every class in a step; a class with fewer shows all it has.
        width: of the networks.
        flip: whether a horizontal flip is among the augmentations.
        seed: of everything random. On the CPU the same seed gives the same images.
        device: where; by default the CPU.
        state: what ``on_step`` was offered in a run that was stopped; it goes on there and comes to the same images.
        on_step: called with the steps done, all steps, and a function that gives the state.

    Returns:
        The images, uint8, shape ``(K * ipc, H, W, C)``, class by class, and the loss of every step.

    Raises:
        ArgumentError: arguments out of range or that do not fit.
        DataError: a class without an image, images below 4 pixels a side, or a loss that is not finite.

    Source: Zhao, Bilen, "Dataset Condensation with Distribution Matching", WACV 2023, arXiv 2110.04181; ConvNet,
    learning rate, momentum and batch of real images are theirs, the augmentation is that of arXiv 2102.08259.
    Deviation: pixels are kept in the range of images after every step, and rounded in the end; classes with few images
    start from noisy copies (:func:`start_images`), and real batches have no image twice.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        raise ArgumentError("images: expected uint8 of shape (N, H, W, C).")
    side = min(images.shape[1:3])
    if side < 4:
        raise DataError(f"Distribution matching needs images of at least 4 pixels a side, got {side}.")
    K, ipc = check_integer("num_classes", num_classes, at_least=1), check_integer("ipc", ipc, at_least=1)
    steps = check_integer("iterations", iterations, at_least=1)
    real_batch = check_integer("real_batch", real_batch, at_least=1)
    lr, momentum = check_number("lr", lr, above=0), check_number("momentum", momentum, at_least=0, below=1)
    where = device or torch.device("cpu")
    members = [(labels == k).nonzero().squeeze(1) for k in range(K)]
    if any(len(rows) == 0 for rows in members):
        raise DataError(f"No image of class {[len(rows) for rows in members].index(0)}; expected one of every class.")
    mean, std = channel_statistics(images)
    low, high = -mean / std, (1 - mean) / std
    low, high = (bound.reshape(-1, 1, 1).to(where) for bound in (low, high))

    def normalised(rows: Tensor) -> Tensor:
        x = images[rows].permute(0, 3, 1, 2).float() / 255
        return (x - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)

    if state is None:
        pixels = start_images(normalised, members, ipc, seed=seed).clamp(low.cpu(), high.cpu()).to(where)
        velocity, losses = torch.zeros_like(pixels), []
    else:
        pixels, velocity = state["pixels"].to(where), state["velocity"].to(where)
        losses = list(state["losses"])
        if pixels.shape != (K, ipc, images.shape[3], *images.shape[1:3]):
            raise ArgumentError("state: expected that of the same images and number per class.")
    while (done := len(losses)) < steps:
        loss, slope = matching_gradient(
            pixels, normalised, members, done, real_batch=real_batch, width=width, flip=flip, seed=seed
        )
        if not math.isfinite(loss):
            raise DataError(f"Distribution matching: the loss of step {done + 1} is not finite; take a smaller lr.")
        velocity = momentum * velocity + slope
        pixels = (pixels - lr * velocity).clamp(low, high)
        losses.append(loss)
        if on_step is not None:
            on_step(len(losses), steps, partial(_snapshot, pixels, velocity, losses))
    x = pixels.flatten(0, 1).cpu() * std.reshape(-1, 1, 1) + mean.reshape(-1, 1, 1)
    return (x * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous(), losses


def matching_gradient(
    pixels: Tensor,
    normalised: Callable[[Tensor], Tensor],
    members: Sequence[Tensor],
    step: int,
    *,
    real_batch: int,
    width: int,
    flip: bool,
    seed: int,
) -> tuple[float, Tensor]:
    """The loss of one step and its gradient in the pixels; a pure function of its arguments.

    Classes are worked on in parts that fit in memory, which changes nothing: no image's embedding depends on another.

    Args:
        pixels: the synthetic images, normalised, shape ``(K, ipc, C, H, W)``.
        normalised: gives real images by row number, shape ``(B, C, H, W)``.
        members: the row numbers of every class.
        step: which step; it says what is drawn.
        real_batch, width, flip, seed: as in :func:`match_distributions`.

    Returns:
        The loss, and the gradient in the shape of ``pixels``.
    """
    K, ipc, C = pixels.shape[:3]
    with forked(seed, "condense", "network", step):
        network = ConvNet(C, min(pixels.shape[3:]), width).requires_grad_(False).to(pixels.device)
    gen = generator(seed, "condense", "step", step)
    views = draw_views(K, flip=flip, gen=gen)
    rows = [r[torch.randperm(len(r), generator=gen)[:real_batch]] for r in members]
    sizes = torch.tensor([len(r) for r in rows])
    slope, loss = torch.zeros_like(pixels), 0.0
    for part in torch.arange(K).split(max(1, _ROWS // (min(real_batch, int(sizes.max())) + ipc))):
        classes = part.tolist()
        index = part.repeat_interleave(sizes[part]).to(pixels.device)
        with torch.no_grad():
            found = network(augment(normalised(torch.cat([rows[k] for k in classes])).to(pixels.device), views, index))
            real = torch.stack([f.mean(0) for f in found.split(sizes[part].tolist())])
        own = pixels[part].detach().requires_grad_(True)
        index = part.repeat_interleave(ipc).to(pixels.device)
        embedded = network(augment(own.flatten(0, 1), views, index)).unflatten(0, (len(part), ipc))
        value = mean_distance(real, embedded)
        slope[part] = torch.autograd.grad(value, own)[0]
        loss += float(value.detach())
    return loss, slope


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel over at most some 10,000 images, in [0, 1]; float32 ``(C,)``."""
    rows = torch.linspace(0, len(images) - 1, min(len(images), 10_000)).round().long()
    pixels = images[rows].flatten(0, 2).double() / 255
    return pixels.mean(0).float(), pixels.std(0, correction=0).clamp_min(1e-3).float()


def _snapshot(pixels: Tensor, velocity: Tensor, losses: list[float]) -> dict[str, Any]:
    return {"pixels": pixels.cpu(), "velocity": velocity.cpu(), "losses": list(losses)}
