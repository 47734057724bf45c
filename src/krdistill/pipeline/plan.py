"""What a run will do: its configuration, every name resolved, checked against the data before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..bank import ExternalAnswers, load_answers
from ..bank.plan import DEFAULT_VIEWS, views_that_pay
from ..config import RecipeConfig, RunConfig, StudentConfig, TeacherConfig, check_student
from ..data import DataBundle
from ..data.augment import augmentation_of
from ..data.augment_names import OF_KIND
from ..errors import ArgumentError, ConfigError, ModelError, unknown_name
from ..files import sha256
from ..kinds import NOUNS
from ..models.network import Network, build_network, check_needs, ensemble, file_network, load_network, probe
from ..models.registry import parse_model
from ..models.teacher import Teacher
from ..priors import ClassGroups, ClassPrior
from ..recipes import Options, Recipe, resolve_recipe
from ..stages import load_configured_data, measure
from ..training.task import best_device


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
    answers: ExternalAnswers | None = None
    notes: tuple[str, ...] = ()

    @property
    def recipes(self) -> list[tuple[str, RecipeConfig, Recipe, Options]]:
        """Every student to train: its place in the run folder, and how it is taught. Baselines come first."""
        rows = [(f"baselines/{c.key}", c, r, o) for c, r, o in self.baselines]
        return [*rows, ("student", self.config.recipe, self.recipe, self.options)]

    @property
    def bank_users(self) -> list[str]:
        """The students that can learn from stored answers."""
        return [stage for stage, _, recipe, _ in self.recipes if reads_bank(recipe)]

    @property
    def bank_views(self) -> int:
        """How many views of every image a bank holds; 0 where the teacher is asked in every step.

        It does not depend on what is done already: a run that goes on sees the same answers.
        """
        config, train = self.config.bank, self.config.student.train
        if not self.bank_users or self.answers is not None or train.mixup > 0:
            return 0
        if config.views != "auto":
            return config.views
        if config.folder:  # kept for others
            return min(train.epochs, DEFAULT_VIEWS)
        return views_that_pay(train.epochs, len(self.bank_users))


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
    model_asked(config.teacher)
    model_asked(config.student)
    known = {name: words for names in OF_KIND.values() for name, words in names.items()}
    for train in (config.teacher.train, config.student.train):
        if train.augmentation not in known:
            hint = "`krdistill list augmentations` describes them."
            raise ArgumentError(unknown_name("augmentation", train.augmentation, known, hint=hint))
    if config.bank.views not in ("auto", 0):
        _check_bank(config, [(recipe, options), *((r, o) for _, r, o in baselines)])
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device: {config.device!r} was asked for, but torch sees no CUDA device here. Use auto or cpu."
        )
    if config.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: 'mps' was asked for, but torch sees no Metal device here. Use auto or cpu.")
    return recipe, options, baselines


def reads_bank(recipe: Recipe) -> bool:
    return "teacher" in recipe.needs and "maps" not in recipe.needs


def _check_bank(config: RunConfig, recipes: list[tuple[Recipe, Options]]) -> None:
    """Refuses a bank that was asked for and could not be used."""
    if config.student.train.mixup > 0:
        raise ConfigError("bank.views: mixed images cannot be stored; set bank.views 0, or student.train.mixup 0.")
    if config.teacher.answers:
        raise ConfigError("bank.views: teacher.answers are stored answers already; set bank.views 0.")
    if not config.bank.features:
        lost = [r.name for r, options in recipes if reads_bank(r) and "features" in r.needs_with(options)]
        if lost:
            raise ConfigError(
                f"bank.features: {', '.join(lost)} needs the teacher's features; leave bank.features true."
            )


def prepare(config: RunConfig, on_progress: Callable[[int, int], None] | None = None) -> Plan:
    """Loads the data and checks everything against them; trains nothing.

    ``on_progress`` hears of images that are decoded into a cache.
    """
    recipe, options, baselines = check_names(config)
    data = load_configured_data(config.data, on_progress)
    prior, groups = measure(data, config.data.groups)
    answers = load_answers(Path(config.teacher.answers), data) if config.teacher.answers else None
    plan = Plan(config, data, prior, groups, recipe, options, baselines, best_device(config.device), answers)
    return replace(plan, notes=_check_networks(plan))


def model_asked(part: TeacherConfig | StudentConfig) -> str:
    """A network's name with its options, as :func:`build_network` takes it."""
    return str(parse_model(part.model, weights=part.weights, tap=part.tap))


def _check_networks(plan: Plan) -> tuple[str, ...]:
    """Shows both networks a small batch, and gives their notes; what does not fit is refused before any training."""
    config, train = plan.config, plan.data.train
    few = train.inputs[:64]
    given = plan.answers is not None or config.teacher.run or config.teacher.file
    for who, schedule in (("teacher", None if given else config.teacher.train), ("student", config.student.train)):
        if schedule is None:
            continue
        augmentation_of(schedule.augmentation, train)
        if schedule.mixup > 0 and train.kind != "image":
            raise ConfigError(f"{who}.train.mixup: only images can be mixed; set it to 0 for {NOUNS[train.kind]}.")

    def made(part: TeacherConfig | StudentConfig) -> Network:
        return build_network(model_asked(part), class_names=train.class_names, head=part.head, images=few)

    student = made(config.student)
    if config.export.onnx and (student.takes_texts or hasattr(student.backbone, "embeds")):
        raise ConfigError(
            f"export.onnx: the student {config.student.model} is given sentences as texts, and no file for a device "
            "holds its tokenizer. Set export.onnx false, or take a student such as ngram."
        )
    probe(student, what=f"The student {config.student.model}")
    teacher = None if plan.answers is not None else given_teacher(plan) or made(config.teacher)
    if teacher is not None:
        probe(teacher, what=f"The teacher {(teacher.architecture or {}).get('name', 'given')}")
    trained = teacher if teacher is not None and not (config.teacher.run or config.teacher.file) else None
    for who, part, network in (("teacher", config.teacher, trained), ("student", config.student, student)):
        head = network.backbone.get_submodule(network.head_name) if network is not None else None
        if head is not None and part.second_stage != "none" and type(head) is not torch.nn.Linear:
            raise ModelError(
                f"{who}.second_stage {part.second_stage!r} balances a plain linear head; that of {part.model} is "
                f"{type(head).__name__}. Set {who}.second_stage none, or take another network or head."
            )
    for _, _, recipe, options in plan.recipes:
        asked = teacher if "teacher" in recipe.needs else None
        check_needs(recipe.name, recipe.needs_with(options), student=student, teacher=asked)
    return (*(teacher.notes if teacher is not None else ()), *student.notes)


def load_stored(plan: Plan, path: Path) -> Network:
    """A stored network; the factories that the configuration itself names may be imported for it."""
    named = [parse_model(part.model).name for part in (plan.config.teacher, plan.config.student)]
    return load_network(path, allow_factories=named)


def given_teacher(plan: Plan) -> Network | None:
    """The teacher of earlier runs or of a file, checked against the data, where the configuration names one."""
    config, train = plan.config.teacher, plan.data.train
    if config.file:
        network = file_network(Path(config.file), class_names=train.class_names, images=train.inputs, tap=config.tap)
        Teacher(network, class_names=plan.prior.class_names)
        return network
    if not config.run:
        return None
    networks = []
    for path in map(Path, teacher_runs(config)):
        if not path.is_dir():
            raise ModelError(f"teacher.run: no folder {str(path)!r}. Expected an earlier run folder.")
        networks.append(load_stored(plan, path / "teacher" if (path / "teacher").is_dir() else path))
    network = ensemble(networks)
    Teacher(network, class_names=plan.prior.class_names)
    if not network.takes(train.inputs):
        what = train.shape if train.kind == "image" else f"{NOUNS[train.kind]} {train.shape}".strip()
        raise ModelError(
            f"The teacher in {', '.join(teacher_runs(config))} takes {network.takes_words}; the data are {what}. "
            f"{'Set data.image_size, or take' if train.kind == 'image' else 'Take'} another teacher."
        )
    return network


def teacher_runs(config: TeacherConfig) -> tuple[str, ...]:
    return (config.run,) if isinstance(config.run, str) else config.run or ()


def checksums(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the files that a configuration takes networks or answers from."""
    named = [config.teacher.file, config.teacher.answers, config.teacher.weights, config.student.weights]
    given = [Path(run) for run in teacher_runs(config.teacher)]
    paths = [run / "teacher" if (run / "teacher").is_dir() else run for run in given]
    files = [*(path / "model.safetensors" for path in paths), *(Path(name) for name in named if name)]
    return {str(path): sha256(path) for path in files if path.is_file()}
