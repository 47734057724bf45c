"""The stages of the main job, as functions on plain objects: measure, train, profile, distil, evaluate."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import DataConfig, GroupRule, TrainConfig
from .data import DataBundle, load_data
from .data.augment import Compose, Cutout, RandomCrop, TrivialAugmentWide
from .data.containers import ImageData
from .evaluation import evaluate_predictions
from .events import Events
from .models.network import Network, build_network
from .models.teacher import Teacher
from .objective import Objective, ObjectiveContext, TeacherProfile, classification_term
from .priors import ClassGroups, ClassPrior
from .recipes import Options, Recipe
from .recipes.distill import DistillOptions, resolve_tau
from .rectify import class_means, remove_prior
from .training.loop import EpochRecord, Trainer, collect_outputs
from .training.task import Task, best_device

CHECKPOINT_SECONDS = 20.0
MAX_VIEW_VALUES = 32_000_000  # logits kept of a teacher's profile: 128 MB of float32


class TrainingStore(Protocol):
    """Where a training keeps its checkpoints and its log; a run folder is one."""

    def load_checkpoint(self, stage: str) -> dict[str, Any] | None: ...
    def save_checkpoint(self, stage: str, state: dict[str, Any]) -> None: ...
    def rewind_log(self, stage: str, epoch: int) -> None: ...
    def log(self, line: dict[str, Any]) -> None: ...


@dataclass
class Trained:
    """A trained network with what its training left behind."""

    network: Network
    record: dict[str, Any] = field(default_factory=dict)


def measure(data: DataBundle, groups: GroupRule = "shot") -> tuple[ClassPrior, ClassGroups]:
    """The class prior of the training images and the groups of classes."""
    prior = ClassPrior.from_counts(data.train.counts(), class_names=data.train.class_names)
    return prior, prior.groups(groups)


def load_configured_data(config: DataConfig) -> DataBundle:
    """The data of a configuration."""
    return load_data(
        config.source,
        root=config.root,
        profile=config.profile,
        imbalance_factor=config.imbalance_factor,
        n_max=config.n_max,
        seed=config.cut_seed,
        val_fraction=config.val_fraction,
        image_size=config.image_size,
        on_unreadable=config.on_unreadable,
        empty=config.empty,
    )


# Stage 1: training ----------------------------------------------------------------------------------------------------


def fit(
    task: Task,
    data: DataBundle,
    groups: ClassGroups,
    train: TrainConfig,
    *,
    seed: int,
    device: torch.device,
    stage: str = "student",
    events: Events | None = None,
    store: TrainingStore | None = None,
) -> dict[str, Any]:
    """Trains a task and evaluates it on the way; the network is left as the last epoch made it.

    The epochs in between are judged on the validation part where there is one, else on the test part: their best is
    reported beside the last epoch, by the name of the part that chose it, and never kept.

    Returns:
        ``{"epochs", "best": {"epoch", "top1", "chosen_on"}, "seconds"}``.
    """
    events = events or Events()
    judged, judged_on = (data.val, "validation") if data.val is not None else (data.test, "test")
    trainer = Trainer(
        task, data.train, train, seed=seed, device=device, on_step=lambda d, t: events.progress(stage, d, t)
    )
    best: dict[str, Any] | None = None
    seconds = 0.0
    if store is not None:
        state = store.load_checkpoint(stage)
        if state is not None:
            trainer.restore(state["trainer"])
            best, seconds = state["best"], state["seconds"]
            events.note(f"{stage}: going on after epoch {trainer.epoch} of {train.epochs}")
        store.rewind_log(stage, trainer.epoch)
    saved = time.perf_counter()
    for record in trainer.epochs():
        seconds += record.seconds
        line = _log_line(stage, record, groups)
        if record.last or record.epoch % train.evaluate_every == 0:
            logits, _ = collect_outputs(trainer.network, judged, device=device)
            scores = evaluate_predictions(logits, judged.labels, groups, class_names=judged.class_names)
            line["test" if data.val is None else "val"] = {
                "top1": scores["top1"],
                "groups": {name: g["accuracy"] for name, g in scores["groups"].items()},
            }
            if best is None or scores["top1"] > best["top1"]:
                best = {"epoch": record.epoch, "top1": scores["top1"], "chosen_on": judged_on}
        events.epoch(stage, line)
        if store is not None:
            store.log(line)
            if time.perf_counter() - saved > CHECKPOINT_SECONDS and not record.last:
                store.save_checkpoint(stage, {"trainer": trainer.state(), "best": best, "seconds": seconds})
                saved = time.perf_counter()
    if trainer.average is not None:
        task.network.load_state_dict(trainer.network.state_dict())
    task.network.eval()
    return {"epochs": train.epochs, "best": best, "seconds": round(seconds, 2)}


def train_teacher(
    data: DataBundle,
    prior: ClassPrior,
    groups: ClassGroups,
    *,
    model: str,
    train: TrainConfig,
    classification: str = "cross-entropy",
    seed: int = 0,
    device: torch.device | None = None,
    events: Events | None = None,
    store: TrainingStore | None = None,
) -> Trained:
    """Trains a teacher from labels alone."""
    network = build_network(model, class_names=data.train.class_names, images=data.train.images, seed=seed)
    term = classification_term(classification, prior, label_smoothing=train.label_smoothing)
    task = Task(network, Objective([term]))
    record = fit(
        task, data, groups, train, seed=seed, device=device or best_device("auto"), stage="teacher", events=events,
        store=store,
    )  # fmt: skip
    return Trained(network, {"model": model, "recipe": classification, **record})


def profile_teacher(
    teacher: Teacher, data: DataBundle, *, seed: int = 0, device: torch.device | None = None
) -> TeacherProfile:
    """Measures what rectification needs to know of a teacher.

    Class means come from the training images as they are. The teacher's own prior and the automatic tau come from
    images it was not fitted to: the validation part where there is one, else strongly augmented training images.
    """
    device = device or best_device("auto")
    _, features = collect_outputs(teacher, data.train, device=device)
    means = class_means(features, data.train.labels, data.train.num_classes)
    if data.val is not None:
        views, words = data.val, "validation images"
    else:
        views, words = _augmented(data.train, seed), "training images under crop, TrivialAugment and a hole"
    limit = max(data.train.num_classes, MAX_VIEW_VALUES // data.train.num_classes)
    if len(views.labels) > limit:
        views = views.subset(torch.linspace(0, len(views.labels) - 1, limit).round().long())
    logits, _ = collect_outputs(teacher, views, device=device)
    return TeacherProfile(means, logits, views.labels, words)


def build_objective(
    recipe: Recipe,
    options: Options,
    prior: ClassPrior,
    groups: ClassGroups,
    student: Network,
    profile: TeacherProfile | None,
    *,
    teacher: Teacher | None = None,
    labels: Tensor | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
) -> Objective:
    """A recipe's objective for a student.

    Args:
        recipe: the method.
        options: its resolved options.
        prior: of the training labels.
        groups: of the classes.
        student: what will be trained.
        profile: what was measured of the teacher; None where the recipe takes none.
        teacher: asked for the widths of its stages alone.
        labels: of the training images, for methods that keep a memory of every image.
        seed: of anchors and projectors.
        label_smoothing: of the classification loss.
    """
    context = ObjectiveContext(
        prior=prior,
        groups=groups,
        student_dim=student.feature_dim,
        teacher=profile,
        seed=seed,
        label_smoothing=label_smoothing,
        student_maps=student.map_channels,
        teacher_maps=teacher.network.map_channels if teacher is not None else (),
        labels=labels,
    )
    return recipe.build(options, context)


def distil(
    student: Network,
    data: DataBundle,
    groups: ClassGroups,
    objective: Objective,
    teacher: Teacher | None,
    train: TrainConfig,
    *,
    seed: int = 0,
    device: torch.device | None = None,
    stage: str = "student",
    events: Events | None = None,
    store: TrainingStore | None = None,
) -> Trained:
    """Trains a student with an objective and a teacher."""
    task = Task(student, objective, teacher)
    record = fit(
        task, data, groups, train, seed=seed, device=device or best_device("auto"), stage=stage, events=events,
        store=store,
    )  # fmt: skip
    return Trained(student, {**record, **objective.summary})


# Stage 2: evaluation --------------------------------------------------------------------------------------------------


def rectified_logits(logits: Tensor, options: Options, context: ObjectiveContext) -> tuple[Tensor, float, str]:
    """The teacher's logits with its prior removed as the recipe says (label prior, tau 1 where it says nothing)."""
    if not isinstance(options, DistillOptions) or options.prior == "none":
        return remove_prior(logits, context.prior.log_prior, 1.0), 1.0, "label"
    log_prior, tau = resolve_tau(options, context)
    return remove_prior(logits, log_prior, tau), tau, options.prior


def evaluate_network(
    network: torch.nn.Module, data: ImageData, groups: ClassGroups, *, device: torch.device | None = None
) -> tuple[dict[str, Any], Tensor]:
    """Metrics on a set of images, and the logits they come from."""
    logits, _ = collect_outputs(network, data, device=device or best_device("auto"))
    return evaluate_predictions(logits, data.labels, groups, class_names=data.class_names), logits


def _augmented(data: ImageData, seed: int) -> ImageData:
    """Every image once, under an augmentation stronger than the training's."""
    side = data.image_size[0]  # no flip: it would change the class of digits and characters
    augment = Compose((RandomCrop(side // 8), TrivialAugmentWide(), Cutout(side // 2)))
    parts = []
    for index in torch.arange(len(data.labels)).split(1024):
        images = data.images[index].permute(0, 3, 1, 2)
        parts.append(augment(images, index, seed=seed, epoch=0).permute(0, 2, 3, 1))
    return replace(data, images=torch.cat(parts).contiguous(), name=f"{data.name}, augmented")


def _log_line(stage: str, record: EpochRecord, groups: ClassGroups) -> dict[str, Any]:
    line: dict[str, Any] = {
        "stage": stage,
        "epoch": record.epoch,
        "epochs": record.epochs,
        "lr": record.lr,
        "seconds": round(record.seconds, 3),
        "loss": record.loss,
        "train_accuracy": record.train_accuracy,
    }
    if "corrected" in record.stats:
        line["correction_rate"] = groups.mean_over(torch.tensor(record.stats["corrected"], dtype=torch.float64))
    return line
