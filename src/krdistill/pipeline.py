"""The main job in a run folder: data, teacher, diagnosis, distillation, evaluation, export, report.

The stages themselves are functions of :mod:`krdistill.stages`; here they are put in order, and a stage whose result is
already in the folder is not done again.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import RecipeConfig, RunConfig, TrainConfig, check_student
from .data import DataBundle
from .data.augment import build_augmentation
from .errors import ConfigError, ModelError, RunFolderError
from .evaluation import diagnose_teacher, evaluate_predictions, prediction_record
from .events import Events
from .files import read_json, replacing, write_json
from .models import create_model, model_info
from .models.experts import Experts
from .models.network import Network, build_network, load_network, save_network
from .models.teacher import Teacher
from .objective import Objective, ObjectiveContext, TeacherProfile, classification_term
from .priors import ClassGroups, ClassPrior
from .recipes import Options, Recipe, resolve_recipe
from .runfolder import (
    DIAGNOSIS,
    DONE,
    EXPORT,
    METRICS,
    ONNX,
    PREDICTIONS,
    PROFILE,
    REPORT,
    SPLIT,
    RunFolder,
    environment,
)
from .stages import (
    build_task,
    distil,
    evaluate_network,
    load_configured_data,
    measure,
    profile_teacher,
    rectified_logits,
    train_experts,
    train_teacher,
)  # fmt: skip
from .training.loop import Trainer, collect_outputs
from .training.task import Task, best_device


@dataclass(frozen=True)
class Plan:
    """A run's configuration, checked against the data, before anything is trained."""

    config: RunConfig
    data: DataBundle
    prior: ClassPrior
    groups: ClassGroups
    recipe: Recipe
    options: Options
    baselines: tuple[tuple[RecipeConfig, Recipe, Options], ...]
    device: torch.device

    @property
    def recipes(self) -> list[tuple[str, RecipeConfig, Recipe, Options]]:
        """Every student to train: its place in the run folder, and how it is taught. Baselines come first."""
        rows = [(f"baselines/{c.key}", c, r, o) for c, r, o in self.baselines]
        return [*rows, ("student", self.config.recipe, self.recipe, self.options)]


def check_names(config: RunConfig) -> tuple[Recipe, Options, tuple[tuple[RecipeConfig, Recipe, Options], ...]]:
    """Resolves every name in a configuration, without touching data; raises for an unknown one."""
    recipe, options = resolve_recipe(config.recipe)
    baselines = tuple((c, *resolve_recipe(c)) for c in config.baselines)
    for name, resolved in ((config.recipe.key, options), *((c.key, o) for c, _, o in baselines)):
        check_student(config.student, name, resolved.classification)
    for who, part in (("teacher", config.teacher), ("student", config.student)):
        if part.second_stage == "tau-norm" and config.data.val_fraction == 0:
            raise ConfigError(
                f"{who}.second_stage: 'tau-norm' chooses its tau on held-out images; set data.val_fraction, as 0.1."
            )
    if not config.teacher.run:
        model_info(config.teacher.model)
    model_info(config.student.model)
    for train in (config.teacher.train, config.student.train):
        build_augmentation(train.augmentation, 32)
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {config.device!r} was asked for, but torch sees no CUDA device here. Use auto or cpu."
        )
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: 'mps' was asked for, but torch sees no Metal device here. Use auto or cpu.")
    return recipe, options, baselines


def prepare(config: RunConfig) -> Plan:
    """Loads the data and checks everything against them; trains nothing."""
    recipe, options, baselines = check_names(config)
    data = load_configured_data(config.data)
    prior, groups = measure(data, config.data.groups)
    for who, name in (("teacher", config.teacher.model), ("student", config.student.model)):
        if who == "student" or not config.teacher.run:
            with torch.device("meta"):  # wrong sizes show here, at no cost
                create_model(
                    name,
                    num_classes=prior.num_classes,
                    in_channels=data.train.channels,
                    image_size=data.train.image_size[0],
                )
    plan = Plan(config, data, prior, groups, recipe, options, baselines, best_device(config.device))
    _given_teacher(plan)  # an earlier run's teacher that does not fit is refused here
    return plan


# The whole job in a folder --------------------------------------------------------------------------------------------


def run(plan: Plan, out: Path, *, events: Events | None = None) -> dict[str, Any]:
    """Runs every stage that is not done yet, in a run folder.

    Returns:
        The metrics, as in ``metrics.json``.
    """
    events = events or Events()
    folder = open_folder(plan, out)
    teacher = _teacher_stage(folder, plan, events)
    profile = _diagnosis_stage(folder, plan, teacher, events)
    for stage, config, recipe, options in plan.recipes:
        _student_stage(folder, plan, stage, config, recipe, options, teacher, profile, events)
    metrics = _evaluation_stage(folder, plan, teacher, profile, events)
    if plan.config.export.onnx:
        _export_stage(folder, plan, events)
    from .reporting import write_report  # matplotlib is not needed before

    events.stage("report", REPORT)
    with folder.timed("report"):
        write_report(folder.path)
    return metrics


def estimate_seconds(plan: Plan, out: Path, *, steps: int = 3) -> dict[str, float]:
    """How long each training that is left will take, from a few measured steps on throw-away networks.

    Returns:
        Stage to seconds; evaluation on the way is counted in, and epochs that a checkpoint holds are not.
    """
    folder = RunFolder(out, plan.config)
    config, data = plan.config, plan.data
    names, images = data.train.class_names, data.train.images
    result: dict[str, float] = {}
    teacher_network = _given_teacher(plan) or build_network(config.teacher.model, class_names=names, images=images)
    judged = data.val if data.val is not None else data.test

    def seconds(task: Task, train: TrainConfig) -> float:
        trainer = Trainer(task, data.train, train, seed=0, device=plan.device)
        trainer.task.train()
        batches = [b for b in trainer.batches(0)][: steps + 1]
        trainer.step(0, 0, batches[0])
        started = time.perf_counter()
        for i, index in enumerate(batches[1:] or batches):
            terms, _, _ = trainer.step(0, i + 1, index)
            float(next(iter(terms.values())).sum())  # waits for the device
        per_step = (time.perf_counter() - started) / max(1, len(batches) - 1)
        probe = judged.subset(torch.arange(min(256, len(judged.labels))))
        collect_outputs(task.network, probe, device=plan.device)
        started = time.perf_counter()
        collect_outputs(task.network, probe, device=plan.device)
        per_evaluation = (time.perf_counter() - started) / len(probe.labels) * len(judged.labels)
        evaluations = train.epochs // train.evaluate_every + 1
        return per_step * trainer.steps_per_epoch * train.epochs + per_evaluation * evaluations

    def left(stage: str, train: TrainConfig) -> float:
        state = folder.load_checkpoint(stage)
        return 1.0 if state is None else 1.0 - state["trainer"]["epoch"] / train.epochs

    if not config.teacher.run and folder.done("teacher") is None:
        train, task = config.teacher.train, _supervised(plan, teacher_network)
        result["teacher"] = seconds(task, train) * left("teacher", train)
    teacher = Teacher(teacher_network, class_names=names)
    dim = teacher.feature_dim
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4 * plan.prior.num_classes) % plan.prior.num_classes
    profile = TeacherProfile(
        torch.nn.functional.normalize(torch.randn(plan.prior.num_classes, dim, generator=generator), dim=1),
        torch.randn(4 * plan.prior.num_classes, plan.prior.num_classes, generator=generator),
        labels,
        "random numbers, for timing only",
        torch.randn(len(labels), dim, generator=generator),
        labels,
    )
    known: dict[bool, float] = {}
    for stage, _, recipe, options in plan.recipes:
        if folder.done(stage) is not None:
            continue
        asks = bool(recipe.needs & {"teacher", "experts"})
        if asks not in known:
            student = build_network(config.student.model, class_names=names, images=images)
            timed, its_options = (recipe, options) if "experts" not in recipe.needs else resolve_recipe(_PLAIN)
            task = build_task(
                timed, its_options, student, data, plan.prior, plan.groups, teacher=teacher, profile=profile
            )
            known[asks] = seconds(task, config.student.train)
        result[stage] = known[asks] * left(stage, config.student.train)
        if "experts" in recipe.needs and not folder.part("experts").is_dir():
            result["experts"] = seconds(_supervised(plan, teacher_network), config.teacher.train)
    return result


_PLAIN = RecipeConfig(name="kd")


def _supervised(plan: Plan, network: Network) -> Task:
    """A throw-away copy of the teacher's training, for timing."""
    fresh = copy.deepcopy(network).requires_grad_(True)
    return Task(fresh, Objective([classification_term("cross-entropy", plan.prior)]))


def open_folder(plan: Plan, out: Path) -> RunFolder:
    """Opens the run folder for this plan, or makes it; one that holds another run or other data is refused."""
    folder = RunFolder(out, plan.config)
    split = {
        **plan.data.split,
        "name": plan.data.name,
        "class_names": list(plan.prior.class_names),
        "counts": plan.prior.counts.tolist(),
        "test_counts": plan.data.test.counts().tolist(),
        "imbalance_factor": plan.prior.imbalance_factor,
        "groups": plan.groups.as_dict(),
        "train_images": len(plan.data.train.labels),
        "val_images": len(plan.data.val.labels) if plan.data.val is not None else 0,
        "test_images": len(plan.data.test.labels),
    }
    known = folder.path / SPLIT
    if known.is_file():
        old = read_json(known).get("checksum")
        if old != split["checksum"]:
            raise RunFolderError(
                f"{folder.path} was begun on other data (split checksum {str(old)[:12]}, "
                f"now {split['checksum'][:12]}): the files changed since. Nothing was touched. "
                "Choose another folder with --out."
            )
    write_json(known, split)
    folder.note_provenance(
        **{**environment(plan.device), **{k: v for k, v in folder.provenance().items() if k == "started"}},
        seed=plan.config.seed,
        split_checksum=split["checksum"],
    )
    return folder


def _given_teacher(plan: Plan) -> Network | None:
    """The teacher of an earlier run, checked against the data, where the configuration names one."""
    if not plan.config.teacher.run:
        return None
    path = Path(plan.config.teacher.run)
    if not path.is_dir():
        raise ModelError(f"teacher.run: no folder {str(path)!r}. Expected an earlier run folder.")
    network = load_network(path / "teacher" if (path / "teacher").is_dir() else path)
    Teacher(network, class_names=plan.prior.class_names)
    if network.channels != plan.data.train.channels or network.image_size != plan.data.train.image_size:
        raise ModelError(
            f"The teacher in {path} takes images of {network.image_size[0]}x{network.image_size[1]} with "
            f"{network.channels} channel(s); the data are {plan.data.train.image_size[0]}x"
            f"{plan.data.train.image_size[1]} with {plan.data.train.channels}. "
            "Set data.image_size, or take another teacher."
        )
    return network


def _teacher_stage(folder: RunFolder, plan: Plan, events: Events) -> Teacher:
    config = plan.config.teacher
    record = folder.done("teacher")
    if record is not None:
        events.skipped("teacher", f"{record['model']}, already trained")
        return Teacher(load_network(folder.part("teacher")), class_names=plan.prior.class_names)
    given = _given_teacher(plan)
    if given is not None:
        events.stage("teacher", f"taken from {config.run}")
        save_network(given, folder.part("teacher"))
        source = Path(str(config.run)) / "teacher" / DONE
        earlier = read_json(source) if source.is_file() else {}
        name = (given.architecture or {}).get("name", "custom")
        folder.finish(
            "teacher", {"model": name, "recipe": "given", "epochs": None, "best": None, **earlier, "run": config.run}
        )
        return Teacher(given, class_names=plan.prior.class_names)
    events.stage("teacher", f"{config.model}, {config.classification}, {config.train.epochs} epochs")
    with folder.timed("teacher"):
        trained = train_teacher(
            plan.data, plan.prior, plan.groups, model=config.model, train=config.train,
            classification=config.classification, head=config.head, second_stage=config.second_stage,
            seed=plan.config.seed, device=plan.device, events=events,
            store=folder,
        )  # fmt: skip
        save_network(trained.network, folder.part("teacher"))
        folder.finish("teacher", trained.record)
    return Teacher(trained.network, class_names=plan.prior.class_names)


def _diagnosis_stage(folder: RunFolder, plan: Plan, teacher: Teacher, events: Events) -> TeacherProfile:
    stored = folder.part("teacher") / PROFILE
    if stored.is_file() and (folder.part("teacher") / DIAGNOSIS).is_file():
        events.skipped("diagnosis", "already done")
        values = torch.load(stored, weights_only=True)
        return TeacherProfile(**values)
    events.stage("diagnosis", "whom does the teacher favour?")
    with folder.timed("diagnosis"):
        profile = profile_teacher(teacher, plan.data, seed=plan.config.seed, device=plan.device)
        with replacing(stored) as part:
            torch.save({f.name: getattr(profile, f.name) for f in fields(profile)}, part)
        logits, _ = collect_outputs(teacher, plan.data.test, device=plan.device)
        train_logits, _ = collect_outputs(teacher, plan.data.train, device=plan.device)
        context = ObjectiveContext(prior=plan.prior, groups=plan.groups, student_dim=1, teacher=profile)
        rectified, tau, prior = rectified_logits(logits, plan.options, context)
        diagnosis = diagnose_teacher(
            logits, plan.data.test.labels, plan.prior, plan.groups, rectified_logits=rectified,
            train_logits=train_logits, train_labels=plan.data.train.labels,
        )  # fmt: skip
        write_json(
            folder.part("teacher") / DIAGNOSIS,
            {**diagnosis, "rectified_by": {"prior": prior, "tau": tau}, "views": profile.views},
        )
    for sentence in diagnosis["verdict"]:
        events.note(sentence)
    return profile


def _student_stage(
    folder: RunFolder, plan: Plan, stage: str, config: RecipeConfig, recipe: Recipe, options: Options,
    teacher: Teacher, profile: TeacherProfile, events: Events,
) -> None:  # fmt: skip
    model, train, seed = plan.config.student.model, plan.config.student.train, plan.config.seed
    if folder.done(stage) is not None:
        events.skipped(stage, f"{model} by {config.key}, already trained")
        return
    events.stage(stage, f"{model} by {config.key}, {train.epochs} epochs")
    with folder.timed(stage):
        student = build_network(
            model, class_names=plan.prior.class_names, head=plan.config.student.head, images=plan.data.train.images,
            seed=seed + 1,
        )  # fmt: skip
        task = build_task(
            recipe, options, student, plan.data, plan.prior, plan.groups, teacher=teacher, profile=profile,
            experts=_experts(folder, plan, events) if "experts" in recipe.needs else None,
            label_smoothing=train.label_smoothing, seed=seed,
        )  # fmt: skip
        trained = distil(
            task, plan.data, plan.groups, train, second_stage=plan.config.student.second_stage, seed=seed,
            device=plan.device, stage=stage, events=events, store=folder,
        )  # fmt: skip
        save_network(trained.network, folder.part(stage))
        record = {"model": model, "recipe": config.key, "options": options.model_dump(mode="json"), **trained.record}
        folder.finish(stage, record)


def _experts(folder: RunFolder, plan: Plan, events: Events) -> Experts:
    """The experts of the class groups, trained once for the run."""

    def trained(name: str) -> Network | None:
        stage = f"experts/{name}"
        return load_network(folder.part(stage)) if folder.done(stage) is not None else None

    def keep(name: str, network: Network) -> None:
        save_network(network, folder.part(f"experts/{name}"))
        folder.finish(f"experts/{name}", {"model": plan.config.teacher.model})

    return train_experts(
        plan.data, plan.groups, model=plan.config.teacher.model, train=plan.config.teacher.train,
        seed=plan.config.seed, device=plan.device, events=events, store=folder, trained=trained, keep=keep,
    )  # fmt: skip


def _evaluation_stage(
    folder: RunFolder, plan: Plan, teacher: Teacher, profile: TeacherProfile, events: Events
) -> dict[str, Any]:
    if (folder.path / METRICS).is_file() and (folder.path / PREDICTIONS).is_file():
        events.skipped("evaluation", "already done")
        metrics: dict[str, Any] = read_json(folder.path / METRICS)
        return metrics
    test = plan.data.test
    events.stage("evaluation", f"{len(test.labels):,} test images")
    arrays: dict[str, np.ndarray] = {"labels": test.labels.numpy().astype(np.int32)}

    def describe(key: str, scores: dict[str, Any], logits: Tensor, network: Network, stage: str) -> dict[str, Any]:
        done = folder.done(stage) or {}
        for name, values in prediction_record(logits, test.labels).items():
            arrays[f"{key}.{name}"] = values
        about = {
            "model": done.get("model"),
            "recipe": done.get("recipe"),
            "parameters": network.parameter_count,
            "split": "test",
            "selection": "last",
            "epochs": done.get("epochs"),
            "best": done.get("best"),
        }
        return {**about, **scores}

    with folder.timed("evaluation"):
        scores, logits = evaluate_network(teacher, test, plan.groups, device=plan.device)
        metrics = {"teacher": describe("teacher", scores, logits, teacher.network, "teacher")}
        context = ObjectiveContext(prior=plan.prior, groups=plan.groups, student_dim=1, teacher=profile)
        fixed, tau, prior = rectified_logits(logits, plan.options, context)
        scores = evaluate_predictions(fixed, test.labels, plan.groups, class_names=test.class_names)
        metrics["teacher_rectified"] = {
            **describe("teacher_rectified", scores, fixed, teacher.network, "teacher"),
            "best": None,
            "recipe": f"{prior} prior removed, tau {tau:.2f}",
        }
        baselines = {}
        for stage, config, _, _ in plan.recipes:
            network = load_network(folder.part(stage))
            scores, logits = evaluate_network(network, test, plan.groups, device=plan.device)
            row = describe(stage, scores, logits, network, stage)
            if stage == "student":
                metrics["student"] = row
            else:
                baselines[config.key] = row
        metrics["baselines"] = baselines
        metrics["split_checksum"] = folder.provenance()["split_checksum"]
        with replacing(folder.path / PREDICTIONS) as part:
            np.savez_compressed(part, **arrays)  # type: ignore[arg-type]
        write_json(folder.path / METRICS, metrics)
    return metrics


def _export_stage(folder: RunFolder, plan: Plan, events: Events) -> None:
    from .deploy import export_onnx, verify_onnx

    if (folder.path / EXPORT).is_file() and (folder.path / ONNX).is_file():
        events.skipped("export", "already done")
        return
    events.stage("export", ONNX)
    with folder.timed("export"):
        network = load_network(folder.part("student"))
        export_onnx(network, folder.path / ONNX)
        check = verify_onnx(folder.path / ONNX, network, plan.data.test.images)
        write_json(folder.path / EXPORT, check)
    events.note(check["sentence"])
