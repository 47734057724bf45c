"""The training loop, from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..config import TrainConfig
from ..data.augment import build_augmentation, mixup
from ..data.containers import ImageData
from ..errors import KrdistillError
from ..models.network import Network
from ..sampling import Sampling, epoch_order
from .optim import build_optimizer, learning_rate
from .task import Task, place


class DivergedError(KrdistillError):
    """The loss stopped being a finite number."""


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch measured.

    Attributes:
        epoch: from 1.
        epochs: of the whole training.
        lr: learning rate of the epoch's last step.
        seconds: wall time of its training steps.
        loss: mean of every term, and ``total``.
        train_accuracy: on the augmented training images, as they were seen.
        stats: name of a per-sample statistic to its mean by class, ``(K,)`` (NaN where the class was not seen).
        last: whether it was the last epoch.
    """

    epoch: int
    epochs: int
    lr: float
    seconds: float
    loss: dict[str, float]
    train_accuracy: float
    stats: dict[str, list[float]] = field(default_factory=dict)

    @property
    def last(self) -> bool:
        return self.epoch == self.epochs


class Trainer:
    """Trains a task on images that are held in memory, epoch by epoch.

    Args:
        task: what is trained.
        data: the training images.
        config: how.
        seed: of order, augmentation and mixup.
        device: where.
        on_step: called with (steps done, steps in all) after every step.
    """

    def __init__(
        self,
        task: Task,
        data: ImageData,
        config: TrainConfig,
        *,
        seed: int,
        device: torch.device,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.task = task
        place(task, device)
        if task.teacher is not None:
            place(task.teacher, device)
        self.config, self.seed, self.device, self.on_step = config, seed, device, on_step
        self.images = data.images.to(device)
        self.labels = data.labels.to(device)
        self.num_classes = data.num_classes
        self.augment = build_augmentation(config.augmentation, data.image_size[0])
        self.optimizer = build_optimizer(config, task.parameters())
        self.average = (
            AveragedModel(task.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            if config.ema > 0
            else None
        )
        self.sampler: Sampling = task.objective.sampler if config.sampler == "recipe" else config.sampler
        self.steps_per_epoch = math.ceil(len(data.labels) / config.batch_size)
        self.epoch = 0

    @property
    def network(self) -> Network:
        """The network to evaluate and keep: the moving average where there is one."""
        return cast(Network, self.average.module) if self.average is not None else self.task.network

    def batches(self, epoch: int) -> tuple[Tensor, ...]:
        """Row numbers of an epoch's batches, in order.

        Their sizes differ by one at most, so that no batch of one or two images upsets batch normalisation.
        """
        order = epoch_order(
            self.sampler, self.labels.cpu(), self.seed, epoch, progress=epoch / max(1, self.config.epochs - 1)
        )
        return torch.tensor_split(order, self.steps_per_epoch)

    def epochs(self) -> Iterator[EpochRecord]:
        """Runs the epochs that are left."""
        while self.epoch < self.config.epochs:
            yield self.run_epoch()

    def step(self, epoch: int, step: int, index: Tensor) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """One step: loss terms ``{name: (B,)}``, whether each image was answered rightly, and statistics."""
        index = index.to(self.device)
        images = self.images[index].permute(0, 3, 1, 2)
        labels = self.labels[index]
        progress = (epoch * self.steps_per_epoch + step) / (self.config.epochs * self.steps_per_epoch)
        images = self.augment(images, index, seed=self.seed, epoch=epoch)
        if self.config.mixup > 0:
            images, partner, share = mixup(images, alpha=self.config.mixup, seed=self.seed, epoch=epoch, step=step)
            out = self.task.mixed(images, labels, labels[partner], share, index=index, progress=progress)
        else:
            out = self.task(images, labels, index=index, progress=progress)
        loss = out.terms.total().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.task.network)
        with torch.no_grad():
            terms = {name: value.detach() for name, value in out.terms.terms.items()}
            correct = out.logits.argmax(1) == labels
        return terms, correct, out.terms.stats

    def run_epoch(self) -> EpochRecord:
        """Runs one epoch and measures it; nothing is read back from the device before its end."""
        epoch, config = self.epoch, self.config
        self.task.train()
        sums: dict[str, Tensor] = {}
        stat_sums: dict[str, Tensor] = {}
        right = torch.zeros((), device=self.device, dtype=torch.float64)
        seen = torch.zeros(self.num_classes, device=self.device, dtype=torch.float64)
        lr = config.lr
        started = time.perf_counter()
        for step, index in enumerate(self.batches(epoch)):
            done = epoch * self.steps_per_epoch + step
            lr = learning_rate(config, (done + 1) / (config.epochs * self.steps_per_epoch + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            terms, correct, stats = self.step(epoch, step, index)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0) + value.sum(dtype=torch.float64)
            labels = self.labels[index.to(self.device)]
            seen.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
            for name, value in stats.items():
                per_class = stat_sums.setdefault(name, torch.zeros_like(seen))
                per_class.index_add_(0, labels, value.to(torch.float64))
            right += correct.sum()
            if self.on_step is not None:
                self.on_step(done + 1, config.epochs * self.steps_per_epoch)
        loss = {name: float(value) / len(self.labels) for name, value in sums.items()}
        loss["total"] = sum(loss.values())
        if not math.isfinite(loss["total"]):
            bad = [name for name, value in loss.items() if not math.isfinite(value) and name != "total"]
            raise DivergedError(
                f"The loss is {loss['total']} in epoch {epoch + 1} (terms: {', '.join(bad)}). "
                f"Try a lower learning rate than {config.lr:g}, or more warm-up than {config.warmup:g} of the run."
            )
        self.epoch += 1
        return EpochRecord(
            epoch=self.epoch,
            epochs=config.epochs,
            lr=lr,
            seconds=time.perf_counter() - started,
            loss=loss,
            train_accuracy=float(right) / len(self.labels),
            stats={name: (value / seen).tolist() for name, value in stat_sums.items()},
        )

    def state(self) -> dict[str, Any]:
        """Everything that the epochs to come depend on; all randomness is a function of seed and epoch."""
        return {
            "epoch": self.epoch,
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave."""
        self.epoch = int(state["epoch"])
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def collect_outputs(
    network: torch.nn.Module,
    data: ImageData,
    *,
    device: torch.device,
    batch_size: int = 256,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """A network's answers to images as they are (no augmentation).

    Returns:
        Logits ``(N, K)`` and features ``(N, D)``, float32 on the CPU.
    """
    place(network.eval(), device)
    logits, features = [], []
    with torch.no_grad():
        for start in range(0, len(data.labels), batch_size):
            images = data.images[start : start + batch_size].to(device).permute(0, 3, 1, 2)
            out = network(images)
            logits.append(out.logits.float().cpu())
            features.append(out.feature.float().cpu())
            if on_step is not None:
                on_step(min(start + batch_size, len(data.labels)), len(data.labels))
    return torch.cat(logits), torch.cat(features)
