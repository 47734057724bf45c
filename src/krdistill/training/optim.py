"""Optimisers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from ..config import TrainConfig


def learning_rate(config: TrainConfig, progress: float) -> float:
    """The learning rate at a point of the run.

    Args:
        config: the schedule.
        progress: share of the run that is done, in [0, 1).
    """
    if progress < config.warmup:
        return config.lr * progress / config.warmup
    if config.schedule == "cosine":
        done = (progress - config.warmup) / (1 - config.warmup)
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * config.decay ** sum(progress >= m for m in config.milestones)


def build_optimizer(config: TrainConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The configured optimiser; weight decay goes to every parameter, as in the field's CIFAR recipes.

    One fused kernel updates all parameters where the device has it (CPU, CUDA).
    """
    trained = [p for p in parameters if p.requires_grad]
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in trained)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            trained, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        trained, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov,
        weight_decay=config.weight_decay, fused=fused,
    )  # fmt: skip
