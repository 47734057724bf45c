"""The stage that teaches a student."""

from __future__ import annotations

from ..bank import Answers
from ..config import RecipeConfig
from ..distributed import barrier
from ..events import Events
from ..models.experts import Experts
from ..models.network import Network, build_network
from ..models.teacher import Teacher
from ..objective import TeacherProfile
from ..recipes import Options, Recipe
from ..runfolder import RunFolder
from ..stages import build_task, distil, train_experts
from .folder import keep_network
from .plan import Plan, load_stored, model_asked, reads_bank


def student_stage(
    folder: RunFolder, plan: Plan, stage: str, config: RecipeConfig, recipe: Recipe, options: Options,
    teacher: Teacher | None, profile: TeacherProfile, answers: Answers | None, events: Events,
) -> None:  # fmt: skip
    """Trains a student by a recipe, in its own part of the folder."""
    model, train, seed = plan.config.student.model, plan.config.student.train, plan.config.seed
    if folder.done(stage) is not None:
        events.skipped(stage, f"{model} by {config.key}, already trained")
        return
    events.stage(stage, f"{model} by {config.key}, {train.epochs} epochs")
    with folder.timed(stage):
        student = build_network(
            model_asked(plan.config.student), class_names=plan.prior.class_names, head=plan.config.student.head,
            images=plan.data.train.inputs, seed=seed + 1,
        )  # fmt: skip
        task = build_task(
            recipe, options, student, plan.data, plan.prior, plan.groups, teacher=teacher, profile=profile,
            answers=answers, experts=_experts(folder, plan, events) if "experts" in recipe.needs else None,
            sampler=train.sampler, label_smoothing=train.label_smoothing, seed=seed, device=plan.device,
        )  # fmt: skip
        trained = distil(
            task, plan.data, plan.groups, train, second_stage=plan.config.student.second_stage, seed=seed,
            device=plan.device, stage=stage, answers=answers if reads_bank(recipe) else None, events=events,
            world=folder.world, store=folder,
        )  # fmt: skip
        keep_network(folder, stage, trained.network)
        record = {"model": model, "recipe": config.key, "options": options.model_dump(mode="json")}
        record |= {"sampler": task.objective.sampler, **trained.record}
        folder.finish(stage, record)
    barrier(folder.world)  # the others read what the first has written


def _experts(folder: RunFolder, plan: Plan, events: Events) -> Experts:
    """The experts of the class groups, trained once for the run."""

    def trained(name: str) -> Network | None:
        stage = f"experts/{name}"
        return load_stored(plan, folder.part(stage)) if folder.done(stage) is not None else None

    def keep(name: str, network: Network) -> None:
        keep_network(folder, f"experts/{name}", network)
        folder.finish(f"experts/{name}", {"model": plan.config.teacher.model})

    return train_experts(
        plan.data, plan.groups, model=model_asked(plan.config.teacher), train=plan.config.teacher.train,
        seed=plan.config.seed, device=plan.device, world=folder.world, events=events, store=folder, trained=trained,
        keep=keep,
    )  # fmt: skip
