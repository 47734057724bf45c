"""How long a plan will take, measured on a few steps."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import torch
from torch import Tensor

from ..bank import Answers, ExternalAnswers
from ..bank.store import CHUNK
from ..config import RecipeConfig, TrainConfig
from ..models.network import Network, build_network
from ..models.teacher import Teacher
from ..objective import Objective, TeacherProfile, classification_term
from ..outputs import Outputs
from ..recipes import resolve_recipe
from ..recipes.distill import DistillOptions
from ..rectify.classifier_refit import seconds_to_fit
from ..runfolder import RunFolder
from ..stages import MAX_VIEW_VALUES, build_task, kept_rows
from ..training.loop import Trainer, collect_outputs
from ..training.task import Task
from .answers import bank_is_there
from .plan import Plan, given_teacher, model_asked, reads_bank


def estimate_seconds(plan: Plan, out: Path, *, steps: int = 3) -> dict[str, float]:
    """How long each training that is left will take, from a few measured steps on throw-away networks.

    Returns:
        Stage to seconds; evaluation on the way is counted in, and epochs that a checkpoint holds are not.
        ``classifier`` is the one that is fitted on the teacher's features, where a recipe asks for it.
    """
    folder = RunFolder(out, plan.config)
    config, data = plan.config, plan.data
    names, images = data.train.class_names, data.train.inputs
    result: dict[str, float] = {}
    teacher_network = given_teacher(plan) or build_network(
        model_asked(config.teacher), class_names=names, images=images
    )
    judged = data.val if data.val is not None else data.test

    def seconds(task: Task, train: TrainConfig, answers: Answers | None = None) -> float:
        plain = train.model_copy(update={"compile": "none"})  # it would take longer than what is measured
        trainer = Trainer(task, data.train, plain, seed=0, device=plan.device, answers=answers)
        trainer.task.train()
        batches = trainer.batches(0)[: steps + 1]
        once = _embedding_seconds(plan, task.network, torch.cat(batches), len(data.train) + len(judged))
        for i, batch in enumerate(trainer.feed.run((batches[0], *(batches[1:] or batches)))):
            out = trainer.step(0, i, *batch)
            float(out.terms.total().detach().sum())  # waits for the device
            if i == 0:
                started = time.perf_counter()
        per_step = (time.perf_counter() - started) / max(1, len(batches) - 1)
        probe = judged.subset(torch.arange(min(256, len(judged.labels))))
        collect_outputs(task.network, probe, device=plan.device)
        started = time.perf_counter()
        collect_outputs(task.network, probe, device=plan.device)
        per_evaluation = (time.perf_counter() - started) / len(probe.labels) * len(judged.labels)
        evaluations = train.epochs // train.evaluate_every + 1
        return once + per_step * trainer.steps_per_epoch * train.epochs + per_evaluation * evaluations

    def left(stage: str, train: TrainConfig) -> float:
        state = folder.load_checkpoint(stage)
        return 1.0 if state is None else 1.0 - state["trainer"]["epoch"] / train.epochs

    external = plan.answers is not None
    if not external and not (config.teacher.run or config.teacher.file) and folder.done("teacher") is None:
        train, task = config.teacher.train, _supervised(plan, teacher_network)
        result["teacher"] = seconds(task, train) * left("teacher", train)
    teacher = Teacher(teacher_network, class_names=names)
    dim = plan.answers.feature_dim if plan.answers is not None else teacher.feature_dim
    views = plan.bank_views
    stored = None
    if views or external:  # zeros in their place, of which no copy is made
        N, K = len(data.train), plan.prior.num_classes
        stored = ExternalAnswers(Outputs(torch.zeros(1, K).expand(N, K), torch.zeros(1, dim).expand(N, dim)))
    if views and not bank_is_there(folder, plan, teacher):
        probe = data.train.subset(torch.arange(min(CHUNK, len(data.train))))
        collect_outputs(teacher, probe, device=plan.device)
        started = time.perf_counter()
        collect_outputs(teacher, probe, device=plan.device)
        result["bank"] = (time.perf_counter() - started) / len(probe) * len(data.train) * views
    profile = _noise(plan.prior.num_classes, dim)
    left_over = [options for stage, _, _, options in plan.recipes if folder.done(stage) is None]
    if dim and any(isinstance(options, DistillOptions) and options.refits for options in left_over):
        rows = len(kept_rows(data.train.labels, plan.prior.num_classes, dim))
        result["classifier"] = seconds_to_fit(rows, plan.prior.num_classes, dim, plan.device)
    known: dict[tuple[bool, bool], float] = {}
    for stage, _, recipe, options in plan.recipes:
        if folder.done(stage) is not None:
            continue
        reads = stored is not None and reads_bank(recipe)
        asks = (bool(recipe.needs & {"teacher", "experts"}), reads)
        if asks not in known:
            student = build_network(model_asked(config.student), class_names=names, images=images)
            timed, its_options = (recipe, options) if "experts" not in recipe.needs else resolve_recipe(_PLAIN)
            task = build_task(
                timed, its_options, student, data, plan.prior, plan.groups, teacher=None if external else teacher,
                profile=profile, answers=stored, sampler=config.student.train.sampler,
            )  # fmt: skip
            known[asks] = seconds(task, config.student.train, stored if reads else None)
        result[stage] = known[asks] * left(stage, config.student.train)
        if "experts" in recipe.needs and not folder.part("experts").is_dir():
            expert = build_network(model_asked(config.teacher), class_names=names, images=images)
            result["experts"] = seconds(_supervised(plan, expert), config.teacher.train)
    return result


_PLAIN = RecipeConfig(name="kd")


class _Noise(TeacherProfile):
    def refitted(self, tau: float = 1.0, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Zeros: no step takes another time with them, and to fit a classifier of a thousand classes takes minutes."""
        return torch.zeros_like(self.class_means), torch.zeros(len(self.class_means))


def _noise(num_classes: int, dim: int) -> TeacherProfile:
    """Random numbers in place of a teacher's, for timing only."""
    K, generator = num_classes, torch.Generator().manual_seed(0)
    labels = torch.arange(max(K, min(4 * K, MAX_VIEW_VALUES // K))) % K
    return _Noise(
        torch.nn.functional.normalize(torch.randn(K, dim, generator=generator), dim=1),
        torch.randn(len(labels), K, generator=generator),
        labels,
        "random numbers, for timing only",
        torch.randn(len(labels), dim, generator=generator),
        labels,
    )


def _embedding_seconds(plan: Plan, network: Network, rows: Tensor, total: int) -> float:
    """How long a frozen encoder takes over so many sentences, measured on a few; they are then remembered."""
    if not hasattr(network.backbone, "embeds"):
        return 0.0
    collect_outputs(network, plan.data.train.subset(rows[:1]), device=plan.device)  # loads the encoder
    started = time.perf_counter()
    collect_outputs(network, plan.data.train.subset(rows), device=plan.device)
    return (time.perf_counter() - started) / len(rows) * total


def _supervised(plan: Plan, network: Network) -> Task:
    """A throw-away copy of the teacher's training, for timing."""
    fresh = copy.deepcopy(network).requires_grad_(True)
    return Task(fresh, Objective([classification_term("cross-entropy", plan.prior)]))
