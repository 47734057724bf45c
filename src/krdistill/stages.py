"""The stages of the main job, as functions on plain objects: measure, train, profile, distil, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from .bank.answers import Answers
from .bank.external import ExternalAnswers
from .config import DataConfig, GroupRule, TrainConfig
from .data import DataBundle, load_data
from .data.augment import Augmentation, Compose, Cutout, RandomCrop, TrivialAugmentWide, WordDropout
from .data.containers import Examples, ImageData
from .distributed import World, broadcast
from .errors import DataError, KrdistillError, ModelError
from .evaluation import evaluate_predictions
from .events import Events
from .kinds import NOUNS, as_batch, as_rows
from .models.experts import Experts
from .models.network import Network, build_network
from .models.reuse import reuse_classifier
from .models.teacher import Teacher
from .objective import Objective, ObjectiveContext, TeacherProfile, classification_term
from .outputs import Outputs
from .priors import ClassGroups, ClassPrior
from .recipes import Options, Recipe
from .recipes.distill import DistillOptions, refitted_teacher, resolve_tau
from .rectify import class_means, remove_prior
from .rectify.second_stage import apply_second_stage
from .rng import derive_seed
from .sampling import Sampling
from .training.loop import DivergedError, EpochRecord, Trainer, collect_features, collect_outputs
from .training.task import Task, best_device

CHECKPOINT_SECONDS = 20.0
MAX_VIEW_VALUES = 32_000_000  # logits kept in a teacher's profile: 128 MB of float32
MAX_FEATURE_VALUES = 1 << 28  # features kept in it, which a classifier is fitted on: 1 GiB, all of ImageNet-LT at 2,048


class StoppedError(KrdistillError):
    """A run was asked to stop, and has: what it did is saved."""


class TrainingStore(Protocol):
    """Where a training keeps its checkpoints and its log, and hears that it should stop; a run folder is one."""

    def stopping(self) -> bool: ...
    def load_checkpoint(self, stage: str, note: Callable[[str], None] | None = None) -> dict[str, Any] | None: ...
    def save_checkpoint(self, stage: str, state: dict[str, Any]) -> None: ...
    def save_nonfinite(self, stage: str, record: dict[str, Any]) -> Path: ...
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
    return prior, prior.groups(groups, noun=NOUNS[data.train.kind])


def load_configured_data(config: DataConfig, on_progress: Callable[[int, int], None] | None = None) -> DataBundle:
    """The data of a configuration; ``on_progress`` hears of images that are decoded into a cache."""
    return load_data(
        config.source,
        root=config.root,
        profile=config.profile,
        imbalance_factor=config.imbalance_factor,
        n_max=config.n_max,
        seed=config.cut_seed,
        val_fraction=config.val_fraction,
        split_by=config.split_by,
        image_size=config.image_size,
        on_unreadable=config.on_unreadable,
        empty=config.empty,
        cache=config.cache,
        on_progress=on_progress,
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
    answers: Answers | None = None,
    world: World | None = None,
    events: Events | None = None,
    store: TrainingStore | None = None,
) -> dict[str, Any]:
    """Trains a task and evaluates it on the way; the network is left as the last epoch made it.

    The epochs in between are judged on the validation part where there is one, else on the test part: their best is
    reported beside the last epoch, by the name of the part that chose it, and never kept. With many processes every one
    calls this, and ``store`` is heard of the first alone.

    Returns:
        ``{"epochs", "best": {"epoch", "top1", "chosen_on"}, "seconds"}``.

    Raises:
        StoppedError: the store said so after a step; its state is saved.
        DivergedError: a loss or gradient was not finite; what the step needs to be run again is saved.
    """
    events = events or Events()
    judged, judged_on = (data.val, "validation") if data.val is not None else (data.test, "test")
    together = world or World.alone()
    best: dict[str, Any] | None = None
    seconds = 0.0
    saved = time.perf_counter()

    def on_step(done: int, total: int) -> None:
        nonlocal saved
        events.progress(stage, done, total)
        if store is None or not together.first or done == total:
            return
        stopping = store.stopping()
        if stopping or time.perf_counter() - saved > CHECKPOINT_SECONDS:
            store.save_checkpoint(stage, {"trainer": trainer.state(), "best": best, "seconds": seconds})
            saved = time.perf_counter()
        if stopping:
            raise StoppedError(f"Stopped after step {done} of {total} of {stage}, and saved; the same command goes on.")

    trainer = Trainer(
        task, data.train, train, seed=seed, device=device, answers=answers, world=together, on_step=on_step
    )
    if trainer.compile_error is not None:
        events.note(f"{stage}: trained without torch.compile, which failed: {trainer.compile_error}")
    if store is not None:
        state = broadcast(store.load_checkpoint(stage, events.note) if together.first else None, together)
        if state is not None:
            trainer.restore(state["trainer"])
            best, seconds = state["best"], state["seconds"]
            within = f", {trainer.sums['steps']} steps into the next" if trainer.sums["steps"] else ""
            events.note(f"{stage}: going on after epoch {trainer.epoch} of {train.epochs}{within}")
        store.rewind_log(stage, trainer.epoch)
    for record in _explained(trainer, stage, store):
        seconds += record.seconds
        line = _log_line(stage, record, groups)
        if record.last or record.epoch % train.evaluate_every == 0:
            logits, _ = collect_outputs(trainer.network, judged, device=device, world=world)
            scores = evaluate_predictions(logits, judged.labels, groups, class_names=judged.class_names)
            line["test" if data.val is None else "val"] = {
                "top1": scores["top1"],
                "groups": {name: g["accuracy"] for name, g in scores["groups"].items()},
            }
            if best is None or scores["top1"] > best["top1"]:
                best = {"epoch": record.epoch, "top1": scores["top1"], "chosen_on": judged_on}
        events.epoch(stage, line)
        if record.skipped:
            events.note(f"{stage}, epoch {record.epoch}: {record.skipped} steps left out. {record.skipped_words}")
        if store is not None:
            store.log(line)
    trainer.finish()
    if trainer.average is not None:
        task.network.load_state_dict(trainer.network.state_dict())
    task.network.eval()
    compiled = {} if trainer.compiled == "none" else {"compiled": trainer.compiled}
    return {"epochs": train.epochs, "best": best, "seconds": round(seconds, 2), **compiled}


def _explained(trainer: Trainer, stage: str, store: TrainingStore | None) -> Iterator[EpochRecord]:
    """A trainer's epochs; a step that gave a number which is not finite is kept, to be run again."""
    try:
        yield from trainer.epochs()
    except DivergedError as error:
        if store is None:
            raise
        path = store.save_nonfinite(stage, error.record)
        raise DivergedError(f"{stage}: {error} The step can be run again from {path}.", error.record) from None


def train_teacher(
    data: DataBundle,
    prior: ClassPrior,
    groups: ClassGroups,
    *,
    model: str,
    train: TrainConfig,
    classification: str = "cross-entropy",
    head: str = "linear",
    second_stage: str = "none",
    seed: int = 0,
    device: torch.device | None = None,
    stage: str = "teacher",
    world: World | None = None,
    events: Events | None = None,
    store: TrainingStore | None = None,
) -> Trained:
    """Trains a teacher from labels alone."""
    device = device or best_device("auto")
    network = build_network(model, class_names=data.train.class_names, head=head, images=data.train.inputs, seed=seed)
    drawn: Sampling = "instance" if train.sampler == "recipe" else train.sampler
    term = classification_term(classification, prior, sampler=drawn, label_smoothing=train.label_smoothing)
    task = Task(network, Objective([term], sampler=drawn))
    record = fit(
        task, data, groups, train, seed=seed, device=device, stage=stage, world=world, events=events, store=store
    )
    record |= balance_head(network, data, second_stage, seed=seed, device=device, world=world)
    return Trained(network, {"model": model, "recipe": classification, **record})


def profile_teacher(
    teacher: Teacher,
    data: DataBundle,
    *,
    features: Tensor | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    world: World | None = None,
) -> TeacherProfile:
    """Measures what rectification needs to know of a teacher.

    Class means come from the training images as they are. The teacher's own prior and the automatic tau come from
    images it was not fitted to: the validation part where there is one, else strongly augmented training images.

    Args:
        teacher: as it is.
        data: training images, and validation images where there are any.
        features: the teacher's of the training images, ``(N, D)``, where they are known already.
        seed: of the augmentation.
        device: where the teacher works.
        world: the processes that share the work.
    """
    device = device or best_device("auto")
    if features is None:
        features = collect_features(teacher, data.train, device=device, world=world)
    if data.val is not None:
        views, words = data.val, f"validation {NOUNS[data.val.kind]}"
    else:
        views, words = _augmented(data.train, seed)
    limit = max(data.train.num_classes, MAX_VIEW_VALUES // data.train.num_classes)
    if len(views.labels) > limit:
        views = views.subset(_evenly(len(views.labels), limit))
    logits, _ = collect_outputs(teacher, views, device=device, world=world)
    return _profile(features, data.train, logits, views.labels, words)


def profile_answers(answers: ExternalAnswers, data: DataBundle) -> TeacherProfile:
    """The same of a teacher of whom only answers are known: its prior is measured on the validation images where there
    are any, else on the training images, which it may have been fitted to."""
    if answers.val is not None and data.val is not None:
        logits, labels, words = answers.val.logits, data.val.labels, f"validation {NOUNS[data.val.kind]}"
    else:
        words = f"training {NOUNS[data.train.kind]} as they are"
        logits, labels = answers.train.logits, data.train.labels
    kept = _evenly(len(labels), max(data.train.num_classes, MAX_VIEW_VALUES // data.train.num_classes))
    return _profile(answers.train.feature, data.train, logits[kept], labels[kept], words)


def _profile(features: Tensor, train: Examples, logits: Tensor, labels: Tensor, words: str) -> TeacherProfile:
    if features.shape[1]:
        means = class_means(features, train.labels, train.num_classes)
    else:
        means = features.new_zeros(train.num_classes, 0)
    kept = kept_rows(train.labels, train.num_classes, features.shape[1])
    return TeacherProfile(means, logits, labels, words, features[kept], train.labels[kept])


def kept_rows(labels: Tensor, num_classes: int, dim: int) -> Tensor:
    """Which training examples' features of that width a profile keeps; see :data:`MAX_FEATURE_VALUES`."""
    return _some_of_each(labels, max(num_classes, MAX_FEATURE_VALUES // max(1, dim)))


def train_experts(
    data: DataBundle,
    groups: ClassGroups,
    *,
    model: str,
    train: TrainConfig,
    seed: int = 0,
    device: torch.device | None = None,
    world: World | None = None,
    events: Events | None = None,
    store: TrainingStore | None = None,
    trained: Callable[[str], Network | None] = lambda name: None,
    keep: Callable[[str, Network], None] = lambda name, network: None,
) -> Experts:
    """One expert per group of at least two classes, each trained on its group's images alone.

    Args:
        data: all images.
        groups: of the classes.
        model: the experts' network.
        train: how they are trained.
        seed: of everything random.
        device: where.
        events: hears what goes on.
        store: keeps their checkpoints and log.
        trained: gives a group's expert where there is one already.
        keep: is given every new expert.
    """
    networks, members = [], []
    for name in groups.names:
        classes = groups.members(name)
        if len(classes) < 2:
            continue
        network = trained(name)
        if network is None:
            part = data.keep_classes(classes)
            prior, own = measure(part)
            network = train_teacher(
                part, prior, own, model=model, train=train, seed=seed, device=device, events=events, store=store,
                stage=f"experts/{name}", world=world,
            ).network  # fmt: skip
            keep(name, network)
        networks.append(network)
        members.append(classes)
    return Experts(networks, members, len(groups.index))


def build_task(
    recipe: Recipe,
    options: Options,
    student: Network,
    data: DataBundle,
    prior: ClassPrior,
    groups: ClassGroups,
    *,
    teacher: Teacher | None = None,
    profile: TeacherProfile | None = None,
    answers: Answers | None = None,
    experts: Experts | None = None,
    sampler: Sampling | Literal["recipe"] = "recipe",
    label_smoothing: float = 0.0,
    seed: int = 0,
    device: torch.device | None = None,
) -> Task:
    """What a recipe trains: the student (with another head where the recipe gives it one), objective and teacher.

    Args:
        recipe: the method.
        options: its resolved options.
        student: what will be trained.
        data: the training images are asked for their labels alone.
        prior: of the training labels.
        groups: of the classes.
        teacher: for recipes that need one.
        profile: what was measured of it.
        answers: what is stored of a teacher that cannot be asked, in its place.
        experts: for recipes that need them.
        sampler: how the training images are drawn, as in ``train.sampler``: losses that hold the class prior hold that
            of the draws.
        label_smoothing: of the classification loss.
        seed: of anchors and projectors.
        device: where a classifier is fitted to many features of the teacher; by default where they are, on the CPU.
    """
    asks = "teacher" in recipe.needs
    if asks and (profile is None or (teacher is None and answers is None)):
        raise ModelError(f"The recipe {recipe.name!r} needs a teacher, got none. Give one, or use the recipe 'none'.")
    if teacher is None and answers is not None:
        lacking = recipe.needs & {"maps"} or (recipe.needs & {"features"} if not answers.feature_dim else set())
        if lacking:
            raise ModelError(
                f"The recipe {recipe.name!r} needs the teacher's {', '.join(sorted(lacking))}, which are not among the "
                "stored answers. Take a recipe that needs its logits alone: `krdistill list recipes` says which."
            )
    if "experts" in recipe.needs and experts is None:
        raise ModelError(f"The recipe {recipe.name!r} needs experts of the class groups, got none.")
    if recipe.reuses_classifier and teacher is not None:
        student = reuse_classifier(student, teacher, factor=options.factor, seed=seed)  # type: ignore[attr-defined]
    head = teacher.network.backbone.get_submodule(teacher.network.head_name) if asks and teacher is not None else None
    context = ObjectiveContext(
        prior=prior,
        groups=groups,
        student_dim=student.feature_dim,
        teacher=profile if asks else None,
        seed=seed,
        sampler=recipe.drawn(sampler),
        label_smoothing=label_smoothing,
        device=device,
        student_maps=student.map_channels,
        teacher_maps=teacher.network.map_channels if asks and teacher is not None else (),
        labels=data.train.labels,
        teacher_head=head if isinstance(head, nn.Linear) else None,
    )
    objective = recipe.build(options, context)
    objective.sampler = context.sampler
    return Task(student, objective, experts if "experts" in recipe.needs else teacher)


def distil(
    task: Task,
    data: DataBundle,
    groups: ClassGroups,
    train: TrainConfig,
    *,
    second_stage: str = "none",
    seed: int = 0,
    device: torch.device | None = None,
    stage: str = "student",
    answers: Answers | None = None,
    world: World | None = None,
    events: Events | None = None,
    store: TrainingStore | None = None,
) -> Trained:
    """Trains a student by a task of :func:`build_task`, then balances its last layer where that is asked for.

    With stored ``answers`` the teacher is not asked.
    """
    device = device or best_device("auto")
    record = fit(
        task, data, groups, train, seed=seed, device=device, stage=stage, answers=answers, world=world, events=events,
        store=store,
    )  # fmt: skip
    balanced = balance_head(task.network, data, second_stage, seed=seed, device=device, world=world)
    return Trained(task.network, {**record, **task.objective.summary, **balanced})


def balance_head(
    network: Network, data: DataBundle, method: str, *, seed: int = 0, device: torch.device | None = None,
    world: World | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The second stage: a network's last linear layer is balanced on its own frozen features, in place.

    Args:
        network: trained.
        data: training images; ``tau-norm`` chooses its tau on the validation part.
        method: ``none``, ``balanced-softmax``, ``crt``, ``tau-norm``, ``lws`` or ``ncm``.
        seed: of the images' order.
        device: where the features are computed, and a large balanced softmax is fitted.

    Returns:
        What was done, for the record.
    """
    if method == "none":
        return {}
    head = network.backbone.get_submodule(network.head_name)
    if type(head) is not nn.Linear:
        raise ModelError(f"second_stage {method!r} balances a plain linear head, got {type(head).__name__}.")
    device = device or best_device("auto")
    features = collect_features(network, data.train, device=device, world=world)
    options: dict[str, Any] = {}
    if method == "tau-norm":
        if data.val is None:
            raise DataError("second_stage 'tau-norm' needs held-out examples to choose its tau; set data.val_fraction.")
        options["held_out"] = (collect_features(network, data.val, device=device, world=world), data.val.labels)
    elif method == "balanced-softmax":
        options["device"] = device
    elif method in ("crt", "lws"):
        options["seed"] = derive_seed(seed, "second-stage") % 2**31
    found = apply_second_stage(head, method, features, data.train.labels, **options)  # type: ignore[arg-type]
    return {"second_stage": method, **found}


# Stage 2: evaluation --------------------------------------------------------------------------------------------------


def rectified_answers(
    answer: Outputs, options: Options, context: ObjectiveContext
) -> tuple[Tensor, dict[str, float | str]]:
    """The teacher's logits, rectified as the recipe says (label prior, tau 1 where it says nothing), and how: the
    ``prior``, the ``tau``, and both in ``words``."""
    if isinstance(options, DistillOptions) and options.prior == "refit":
        tau = float(options.tau)
        words = "classifier re-fitted on its features" + ("" if tau == 1 else f", tau {tau:.2f}")
        return refitted_teacher(context, tau)(answer).logits, {"prior": "refit", "tau": tau, "words": words}
    log_prior, tau, prior = context.prior.log_prior, 1.0, "label"
    if isinstance(options, DistillOptions) and options.prior != "none":
        log_prior, tau = resolve_tau(options, context)
        prior = options.prior
    words = f"{prior} prior removed, tau {tau:.2f}"
    return remove_prior(answer.logits, log_prior, tau), {"prior": prior, "tau": tau, "words": words}


def evaluate_network(
    network: torch.nn.Module,
    data: Examples,
    groups: ClassGroups,
    *,
    device: torch.device | None = None,
    world: World | None = None,
) -> tuple[dict[str, Any], Tensor]:
    """Metrics on a set of images, and the logits they come from."""
    logits, _ = collect_outputs(network, data, device=device or best_device("auto"), world=world)
    return evaluate_predictions(logits, data.labels, groups, class_names=data.class_names), logits


def _evenly(n: int, limit: int) -> Tensor:
    """Row numbers of at most ``limit`` of n rows, evenly spread."""
    return torch.arange(n) if n <= limit else torch.linspace(0, n - 1, limit).round().long()


def _augmented(data: Examples, seed: int) -> tuple[Examples, str]:
    """Every example once, under an augmentation stronger than the training's, and what was done in words."""
    augment: Augmentation
    if isinstance(data, ImageData):
        side = data.image_size[0]  # no flip: it would change the class of digits and characters
        augment = Compose((RandomCrop(side // 8), TrivialAugmentWide(), Cutout(side // 2)))
        words = "training images under crop, TrivialAugment and a hole"
    elif data.kind == "text":
        augment, words = WordDropout(0.3), "training sentences without three tenths of their words"
    else:
        return data, "training rows as they are"
    parts = []
    for index in torch.arange(len(data.labels)).split(1024):
        parts.append(as_rows(augment(as_batch(data.inputs[index]), index, seed=seed, epoch=0)))
    return replace(data, inputs=torch.cat(parts).contiguous(), name=f"{data.name}, augmented"), words


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
    if record.skipped:
        line["skipped"] = record.skipped
    if "corrected" in record.stats:
        line["correction_rate"] = groups.mean_over(torch.tensor(record.stats["corrected"], dtype=torch.float64))
    return line


def _some_of_each(labels: Tensor, limit: int) -> Tensor:
    """Row numbers, rising, of at most ``limit`` rows: the largest classes lose rows first, no class all of them."""
    if len(labels) <= limit:
        return torch.arange(len(labels))
    counts = torch.bincount(labels)
    low, high = 1, int(counts.max())
    while low < high:  # the largest number of rows per class that is within the limit
        middle = (low + high + 1) // 2
        low, high = (middle, high) if int(counts.clamp_max(middle).sum()) <= limit else (low, middle - 1)
    rows = labels.argsort(stable=True).split(counts.tolist())
    return torch.cat([r[_evenly(len(r), low)] for r in rows]).sort().values
