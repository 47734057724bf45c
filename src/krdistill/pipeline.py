"""The main job in a run folder: data, teacher, diagnosis, distillation, evaluation, export, report.

The stages themselves are functions of :mod:`krdistill.stages`; here they are put in order, and a stage whose result is
already in the folder is not done again.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .bank import Answers, BankKey, Coding, ExternalAnswers, ViewBank, build_bank, load_answers, open_bank
from .bank.plan import AUTO_BYTES, DEFAULT_VIEWS, views_that_pay
from .bank.store import CHUNK
from .config import (
    RecipeConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    check_student,
    dump_config,
    load_config,
)
from .data import DataBundle
from .data.augment import Augmentation, augmentation_of
from .data.augment_names import OF_KIND
from .distributed import World, barrier, first_then_all, same_everywhere
from .errors import ArgumentError, ConfigError, ModelError, RunFolderError, unknown_name
from .evaluation import diagnose_teacher, evaluate_predictions, multiply_accumulates, prediction_record
from .events import Events
from .files import DiskError, check_unpacked, read_json, replacing, sha256
from .kinds import NOUNS, encode_texts
from .models.experts import Experts
from .models.network import (
    Network,
    build_network,
    check_needs,
    ensemble,
    file_network,
    load_network,
    probe,
    save_network,
)
from .models.registry import parse_model
from .models.teacher import Teacher
from .objective import Objective, ObjectiveContext, TeacherProfile, classification_term
from .outputs import Outputs
from .priors import ClassGroups, ClassPrior
from .recipes import Options, Recipe, resolve_recipe
from .runfolder import (
    BANK,
    CONFIG,
    DIAGNOSIS,
    DONE,
    EXPORT,
    METRICS,
    ONNX,
    PREDICTIONS,
    PROFILE,
    PROVENANCE,
    REPORT,
    SPLIT,
    RunFolder,
    environment,
    owned,
)
from .stages import (
    StoppedError,
    build_task,
    distil,
    evaluate_network,
    load_configured_data,
    measure,
    profile_answers,
    profile_teacher,
    rectified_answers,
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
        return [stage for stage, _, recipe, _ in self.recipes if _reads_bank(recipe)]

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
    _asked(config.teacher)
    _asked(config.student)
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


def _reads_bank(recipe: Recipe) -> bool:
    return "teacher" in recipe.needs and "maps" not in recipe.needs


def _check_bank(config: RunConfig, recipes: list[tuple[Recipe, Options]]) -> None:
    """Refuses a bank that was asked for and could not be used."""
    if config.student.train.mixup > 0:
        raise ConfigError("bank.views: mixed images cannot be stored; set bank.views 0, or student.train.mixup 0.")
    if config.teacher.answers:
        raise ConfigError("bank.views: teacher.answers are stored answers already; set bank.views 0.")
    if not config.bank.features:
        lost = [r.name for r, options in recipes if _reads_bank(r) and "features" in r.needs_with(options)]
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


def _asked(part: TeacherConfig | StudentConfig) -> str:
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
        return build_network(_asked(part), class_names=train.class_names, head=part.head, images=few)

    student = made(config.student)
    if config.export.onnx and (student.takes_texts or hasattr(student.backbone, "embeds")):
        raise ConfigError(
            f"export.onnx: the student {config.student.model} is given sentences as texts, and no file for a device "
            "holds its tokenizer. Set export.onnx false, or take a student such as ngram."
        )
    probe(student, what=f"The student {config.student.model}")
    teacher = None if plan.answers is not None else _given_teacher(plan) or made(config.teacher)
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


def _load(plan: Plan, path: Path) -> Network:
    """A stored network; the factories that the configuration itself names may be imported for it."""
    named = [parse_model(part.model).name for part in (plan.config.teacher, plan.config.student)]
    return load_network(path, allow_factories=named)


# The whole job in a folder --------------------------------------------------------------------------------------------


def run(
    plan: Plan,
    out: Path,
    *,
    events: Events | None = None,
    report: bool = True,
    world: World | None = None,
    stop: Callable[[], bool] | None = None,
    opened: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Runs every stage that is not done yet, in a run folder, which no other process can work in meanwhile.

    Args:
        plan: what to do.
        out: the run folder.
        events: hears what goes on.
        report: whether ``report.html`` is written; without it, a given teacher's diagnosis is taken as it stands in
            its own run folder.
        world: the processes that train together (:func:`krdistill.distributed.join`); every one calls this function.
        stop: asked after every step and between stages; where it says yes, the state is saved and the run ends. Of
            many processes, that of the first counts.
        opened: called when the folder is this run's, before anything is trained.

    Returns:
        The metrics, as in ``metrics.json``.

    Raises:
        StoppedError: ``stop`` said so.
        DiskError: the disk is full; the message says what is safe.
    """
    events = events or Events()
    with _at_work(plan, out, world, stop) as folder:
        if opened is not None:
            opened()
        for note in plan.notes:
            events.note(note)
        teacher = None if plan.answers is not None else _teacher_stage(folder, plan, events)
        profile = _diagnosis_stage(folder, plan, teacher, events, again=report)
        answers = plan.answers if teacher is None else _bank_stage(folder, plan, teacher, events)
        for stage, config, recipe, options in plan.recipes:
            _student_stage(folder, plan, stage, config, recipe, options, teacher, profile, answers, events)
        if plan.config.bank.views == "auto" and folder.writes:
            shutil.rmtree(folder.path / BANK, ignore_errors=True)  # nobody asked for it, and nobody needs it any more
        metrics = _evaluation_stage(folder, plan, teacher, profile, events)
        if not folder.writes:
            return metrics
        if plan.config.export.onnx:
            _export_stage(folder, plan, events)
        if not report:
            return metrics
        from .reporting import write_report  # matplotlib is not needed before

        _stop_here(folder)
        events.stage("report", REPORT)
        with folder.timed("report"):
            write_report(folder.path)
        return metrics


@contextmanager
def _at_work(
    plan: Plan, out: Path, world: World | None = None, stop: Callable[[], bool] | None = None
) -> Iterator[RunFolder]:
    """The run folder, for this run alone; a full disk is explained."""
    together = world or World.alone()
    with ExitStack() as stack:
        first_then_all(lambda: stack.enter_context(owned(out, plan.config, world=together)), together)
        folder = open_folder(plan, out, together)
        folder.stopping = stop or folder.stopping
        try:
            yield folder
        except DiskError as error:
            raise DiskError(f"{error} {folder.safe()}", error.errno or 0) from None


def _stop_here(folder: RunFolder) -> None:
    """Ends the run between two stages where that was asked for."""
    if folder.writes and folder.stopping():
        raise StoppedError(f"Stopped. {folder.safe()} Give the same command again.")


def run_teacher(plan: Plan, out: Path, *, events: Events | None = None) -> dict[str, Any]:
    """Runs the teacher's part alone: its training, diagnosis and evaluation, for the runs that will share it.

    Returns:
        The metrics, as in ``metrics.json``; no student is among them.
    """
    events = events or Events()
    with _at_work(plan, out) as folder:
        teacher = _teacher_stage(folder, plan, events)
        profile = _diagnosis_stage(folder, plan, teacher, events)
        return _evaluation_stage(folder, plan, teacher, profile, events, students=False)


def estimate_seconds(plan: Plan, out: Path, *, steps: int = 3) -> dict[str, float]:
    """How long each training that is left will take, from a few measured steps on throw-away networks.

    Returns:
        Stage to seconds; evaluation on the way is counted in, and epochs that a checkpoint holds are not.
    """
    folder = RunFolder(out, plan.config)
    config, data = plan.config, plan.data
    names, images = data.train.class_names, data.train.inputs
    result: dict[str, float] = {}
    teacher_network = _given_teacher(plan) or build_network(_asked(config.teacher), class_names=names, images=images)
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
    if views and not _bank_is_there(folder, plan, teacher):
        probe = data.train.subset(torch.arange(min(CHUNK, len(data.train))))
        collect_outputs(teacher, probe, device=plan.device)
        started = time.perf_counter()
        collect_outputs(teacher, probe, device=plan.device)
        result["bank"] = (time.perf_counter() - started) / len(probe) * len(data.train) * views
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
    known: dict[tuple[bool, bool], float] = {}
    for stage, _, recipe, options in plan.recipes:
        if folder.done(stage) is not None:
            continue
        reads = stored is not None and _reads_bank(recipe)
        asks = (bool(recipe.needs & {"teacher", "experts"}), reads)
        if asks not in known:
            student = build_network(_asked(config.student), class_names=names, images=images)
            timed, its_options = (recipe, options) if "experts" not in recipe.needs else resolve_recipe(_PLAIN)
            task = build_task(
                timed, its_options, student, data, plan.prior, plan.groups, teacher=None if external else teacher,
                profile=profile, answers=stored,
            )  # fmt: skip
            known[asks] = seconds(task, config.student.train, stored if reads else None)
        result[stage] = known[asks] * left(stage, config.student.train)
        if "experts" in recipe.needs and not folder.part("experts").is_dir():
            expert = build_network(_asked(config.teacher), class_names=names, images=images)
            result["experts"] = seconds(_supervised(plan, expert), config.teacher.train)
    return result


_PLAIN = RecipeConfig(name="kd")


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


def open_folder(plan: Plan, out: Path, world: World | None = None) -> RunFolder:
    """Opens the run folder for this plan, or makes it; one that holds another run or other data is refused."""
    world = world or World.alone()
    same_everywhere(dump_config(plan.config) + plan.data.split["checksum"], world, what="configuration and data")
    return first_then_all(lambda: _open(plan, out, world), world)


def _open(plan: Plan, out: Path, world: World) -> RunFolder:
    folder = RunFolder(out, plan.config, world=world)
    split = {
        **plan.data.split,
        "name": plan.data.name,
        "kind": plan.data.train.kind,
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
    folder.write_json(SPLIT, split)
    if folder.writes:
        folder.note_environment(environment(plan.device, world.size), checksums(plan.config))
    folder.note_provenance(seed=plan.config.seed, split_checksum=split["checksum"])
    return folder


def checksums(config: RunConfig) -> dict[str, str]:
    """SHA-256 of the files that a configuration takes networks or answers from."""
    named = [config.teacher.file, config.teacher.answers, config.teacher.weights, config.student.weights]
    given = [Path(run) for run in _runs(config.teacher)]
    paths = [run / "teacher" if (run / "teacher").is_dir() else run for run in given]
    files = [*(path / "model.safetensors" for path in paths), *(Path(name) for name in named if name)]
    return {str(path): sha256(path) for path in files if path.is_file()}


def _given_teacher(plan: Plan) -> Network | None:
    """The teacher of earlier runs or of a file, checked against the data, where the configuration names one."""
    config, train = plan.config.teacher, plan.data.train
    if config.file:
        network = file_network(Path(config.file), class_names=train.class_names, images=train.inputs, tap=config.tap)
        Teacher(network, class_names=plan.prior.class_names)
        return network
    if not config.run:
        return None
    networks = []
    for path in map(Path, _runs(config)):
        if not path.is_dir():
            raise ModelError(f"teacher.run: no folder {str(path)!r}. Expected an earlier run folder.")
        networks.append(_load(plan, path / "teacher" if (path / "teacher").is_dir() else path))
    network = ensemble(networks)
    Teacher(network, class_names=plan.prior.class_names)
    if not network.takes(train.inputs):
        what = train.shape if train.kind == "image" else f"{NOUNS[train.kind]} {train.shape}".strip()
        raise ModelError(
            f"The teacher in {', '.join(_runs(config))} takes {network.takes_words}; the data are {what}. "
            f"{'Set data.image_size, or take' if train.kind == 'image' else 'Take'} another teacher."
        )
    return network


def _runs(config: TeacherConfig) -> tuple[str, ...]:
    return (config.run,) if isinstance(config.run, str) else config.run or ()


def _teacher_stage(folder: RunFolder, plan: Plan, events: Events) -> Teacher:
    config = plan.config.teacher
    record = folder.done("teacher")
    if record is not None:
        events.skipped("teacher", f"{record['model']}, already trained")
        return Teacher(_load(plan, folder.part("teacher")), class_names=plan.prior.class_names)
    given = _given_teacher(plan)
    if given is not None:
        events.stage("teacher", f"taken from {config.file or ', '.join(_runs(config))}")
        _keep(folder, "teacher", given)
        source = Path(str(config.run)) / "teacher" / DONE  # of one run; an ensemble's members have theirs
        earlier = read_json(source) if isinstance(config.run, str) and source.is_file() else {}
        name, place = (given.architecture or {}).get("name", "custom"), config.run or config.file
        folder.finish(
            "teacher", {"model": name, "recipe": "given", "epochs": None, "best": None, **earlier, "run": place}
        )
        return Teacher(given, class_names=plan.prior.class_names)
    events.stage("teacher", f"{config.model}, {config.classification}, {config.train.epochs} epochs")
    with folder.timed("teacher"):
        trained = train_teacher(
            plan.data, plan.prior, plan.groups, model=_asked(config), train=config.train,
            classification=config.classification, head=config.head, second_stage=config.second_stage,
            seed=plan.config.seed, device=plan.device, world=folder.world, events=events, store=folder,
        )  # fmt: skip
        _keep(folder, "teacher", trained.network)
        folder.finish("teacher", trained.record)
    return Teacher(trained.network, class_names=plan.prior.class_names)


def _diagnosis_stage(
    folder: RunFolder, plan: Plan, teacher: Teacher | None, events: Events, *, again: bool = True
) -> TeacherProfile:
    if not again and folder.writes:
        _share_diagnosis(folder, plan)
    stored = folder.part("teacher") / PROFILE
    if stored.is_file() and (folder.part("teacher") / DIAGNOSIS).is_file():
        events.skipped("diagnosis", "already done")
        try:
            check_unpacked(stored, stored=True)
            return TeacherProfile(**torch.load(stored, weights_only=True))
        except Exception as error:  # torch's unpickler raises nearly anything on a damaged file
            raise RunFolderError(f"{stored} is damaged ({error}). Delete it; the diagnosis is made again.") from None
    _stop_here(folder)
    events.stage("diagnosis", "whom does the teacher favour?")
    with folder.timed("diagnosis"):
        if teacher is not None:
            where: dict[str, Any] = {"device": plan.device, "world": folder.world}
            profile = profile_teacher(teacher, plan.data, seed=plan.config.seed, **where)
            answer = Outputs(*collect_outputs(teacher, plan.data.test, **where))
            train_logits, _ = collect_outputs(teacher, plan.data.train, **where)
        else:
            assert plan.answers is not None
            profile = profile_answers(plan.answers, plan.data)
            train_logits = plan.answers.train.logits
            if plan.answers.test is None:
                events.note(
                    f"The stored answers are about none of the test {NOUNS[plan.data.test.kind]}: the teacher itself "
                    "is not evaluated."
                )
                return profile
            answer = plan.answers.test
        if folder.writes:
            with replacing(stored) as part, part.open("wb") as file:
                torch.save({f.name: getattr(profile, f.name) for f in fields(profile)}, file)
        context = ObjectiveContext(prior=plan.prior, groups=plan.groups, student_dim=1, teacher=profile)
        rectified, how = rectified_answers(answer, plan.options, context)
        diagnosis = diagnose_teacher(
            answer.logits, plan.data.test.labels, plan.prior, plan.groups, rectified_logits=rectified,
            train_logits=train_logits, train_labels=plan.data.train.labels,
        )  # fmt: skip
        folder.write_json(
            f"teacher/{DIAGNOSIS}",
            {**diagnosis, "rectified_by": how, "views": profile.views},
        )
    for sentence in diagnosis["verdict"]:
        events.note(sentence)
    return profile


def _bank_stage(folder: RunFolder, plan: Plan, teacher: Teacher, events: Events) -> ViewBank | None:
    """Stores the teacher's answers where that was asked for, or pays."""
    config, views = plan.config.bank, plan.bank_views
    if not views or all(folder.done(stage) is not None for stage in plan.bank_users):
        return None
    augment, coding = _bank_parts(plan, teacher)
    size = views * len(plan.data.train) * coding.row_bytes
    if config.views == "auto" and size > AUTO_BYTES:
        events.note(
            f"A bank of {views} views would take {size / 2**30:.1f} GiB; the teacher is asked in every step instead. "
            f"--bank.views {views} builds it all the same."
        )
        return None
    events.stage("bank", f"{views} views, {size / 2**20:,.0f} MiB, for {', '.join(plan.bank_users)}")

    def on_step(done: int, total: int) -> None:
        events.progress("bank", done, total)
        _stop_here(folder)

    with folder.timed("bank"):
        bank = build_bank(
            teacher, plan.data.train, augment, views=views, root=_bank_root(folder, plan), seed=plan.config.seed,
            coding=coding, device=plan.device, world=folder.world, on_step=on_step,
        )  # fmt: skip
    folder.note_provenance(bank={"views": views, "bytes": size, **coding.as_dict()})
    return bank


def build_bank_of(run: Path, options: Mapping[str, Any], *, events: Events | None = None) -> ViewBank:
    """Stores the answers of a run's teacher, for other runs to share.

    Args:
        run: the run's folder; its teacher must be trained.
        options: fields of :class:`~krdistill.config.BankConfig`; ``views`` and ``folder`` are needed.
        events: hears what goes on.

    Raises:
        RunFolderError: no run folder, or no teacher in it yet.
    """
    events = events or Events()
    if not (run / CONFIG).is_file() or not (run / "teacher" / DONE).is_file():
        raise RunFolderError(f"No trained teacher in {run}. Expected the folder of a run whose teacher is done.")
    given = load_config(str(run / CONFIG)).as_dict()
    teacher_now = {"run": str(run), "model": given["teacher"]["model"]}
    plan = prepare(load_config({**given, "teacher": teacher_now, "bank": {**options}}))
    network = _given_teacher(plan)
    assert network is not None  # teacher.run was given
    teacher = Teacher(network, class_names=plan.prior.class_names)
    root, views, (augment, coding) = Path(options["folder"]), int(options["views"]), _bank_parts(plan, teacher)
    size = views * len(plan.data.train) * coding.row_bytes
    noun = NOUNS[plan.data.train.kind]
    events.stage("bank", f"{views} views of {len(plan.data.train):,} {noun}, {size / 2**20:,.1f} MiB")
    bank = build_bank(
        teacher, plan.data.train, augment, views=views, root=root, seed=plan.config.seed, coding=coding,
        device=plan.device, on_step=lambda done, total: events.progress("bank", done, total),
    )  # fmt: skip
    return bank


def _bank_root(folder: RunFolder, plan: Plan) -> Path:
    return Path(plan.config.bank.folder) if plan.config.bank.folder else folder.path / BANK


def _bank_parts(plan: Plan, teacher: Teacher) -> tuple[Augmentation, Coding]:
    """Which views a plan's bank holds, and how."""
    config = plan.config.bank
    augment = augmentation_of(plan.config.student.train.augmentation, plan.data.train)
    dim = teacher.feature_dim if config.features else 0
    return augment, Coding(plan.prior.num_classes, dim, config.dtype, config.top_k)


def _bank_is_there(folder: RunFolder, plan: Plan, teacher: Teacher) -> bool:
    """Whether the bank stage is behind us: nobody is left to use a bank, or it is built."""
    if all(folder.done(stage) is not None for stage in plan.bank_users):
        return True
    if folder.done("teacher") is None:
        return False
    known = Teacher(_load(plan, folder.part("teacher")), class_names=plan.prior.class_names)
    augment, coding = _bank_parts(plan, known)
    key = BankKey.of(known, plan.data.train, augment, plan.config.seed, coding)
    return open_bank(_bank_root(folder, plan), key, plan.bank_views) is not None


def _share_diagnosis(folder: RunFolder, plan: Plan) -> None:
    """Takes over what was measured of a given teacher, where its folder has it: same weights, images and seed."""
    source = Path(str(plan.config.teacher.run))
    names = [f"teacher/{n}" for n in (PROFILE, DIAGNOSIS)]
    needed = (*names, PROVENANCE, "teacher/model.safetensors")
    if not all((source / n).is_file() for n in needed) or (folder.path / names[-1]).is_file():
        return
    known, mine = read_json(source / PROVENANCE), folder.provenance()
    weights = [(path / "teacher" / "model.safetensors").read_bytes() for path in (source, folder.path)]
    if weights[0] != weights[1] or any(known.get(k) != mine.get(k) for k in ("seed", "split_checksum")):
        return
    for name in names:
        with replacing(folder.path / name) as part:
            shutil.copyfile(source / name, part)


def _student_stage(
    folder: RunFolder, plan: Plan, stage: str, config: RecipeConfig, recipe: Recipe, options: Options,
    teacher: Teacher | None, profile: TeacherProfile, answers: Answers | None, events: Events,
) -> None:  # fmt: skip
    model, train, seed = plan.config.student.model, plan.config.student.train, plan.config.seed
    if folder.done(stage) is not None:
        events.skipped(stage, f"{model} by {config.key}, already trained")
        return
    events.stage(stage, f"{model} by {config.key}, {train.epochs} epochs")
    with folder.timed(stage):
        student = build_network(
            _asked(plan.config.student), class_names=plan.prior.class_names, head=plan.config.student.head,
            images=plan.data.train.inputs, seed=seed + 1,
        )  # fmt: skip
        task = build_task(
            recipe, options, student, plan.data, plan.prior, plan.groups, teacher=teacher, profile=profile,
            answers=answers, experts=_experts(folder, plan, events) if "experts" in recipe.needs else None,
            label_smoothing=train.label_smoothing, seed=seed,
        )  # fmt: skip
        trained = distil(
            task, plan.data, plan.groups, train, second_stage=plan.config.student.second_stage, seed=seed,
            device=plan.device, stage=stage, answers=answers if _reads_bank(recipe) else None, events=events,
            world=folder.world, store=folder,
        )  # fmt: skip
        _keep(folder, stage, trained.network)
        record = {"model": model, "recipe": config.key, "options": options.model_dump(mode="json"), **trained.record}
        folder.finish(stage, record)
    barrier(folder.world)  # the others read what the first has written


def _keep(folder: RunFolder, stage: str, network: Network) -> None:
    if folder.writes:
        save_network(network, folder.part(stage))


def _experts(folder: RunFolder, plan: Plan, events: Events) -> Experts:
    """The experts of the class groups, trained once for the run."""

    def trained(name: str) -> Network | None:
        stage = f"experts/{name}"
        return _load(plan, folder.part(stage)) if folder.done(stage) is not None else None

    def keep(name: str, network: Network) -> None:
        _keep(folder, f"experts/{name}", network)
        folder.finish(f"experts/{name}", {"model": plan.config.teacher.model})

    return train_experts(
        plan.data, plan.groups, model=_asked(plan.config.teacher), train=plan.config.teacher.train,
        seed=plan.config.seed, device=plan.device, world=folder.world, events=events, store=folder, trained=trained,
        keep=keep,
    )  # fmt: skip


def _evaluation_stage(
    folder: RunFolder, plan: Plan, teacher: Teacher | None, profile: TeacherProfile, events: Events,
    *, students: bool = True,
) -> dict[str, Any]:  # fmt: skip
    if (folder.path / METRICS).is_file() and (folder.path / PREDICTIONS).is_file():
        events.skipped("evaluation", "already done")
        done: dict[str, Any] = read_json(folder.path / METRICS)
        return done
    test = plan.data.test
    _stop_here(folder)
    events.stage("evaluation", f"{len(test.labels):,} test {NOUNS[test.kind]}")
    arrays: dict[str, np.ndarray] = {"labels": test.labels.numpy().astype(np.int32)}

    def describe(
        key: str, scores: dict[str, Any], logits: Tensor, network: Network | None, stage: str
    ) -> dict[str, Any]:
        done = folder.done(stage) or {}
        for name, values in prediction_record(logits, test.labels).items():
            arrays[f"{key}.{name}"] = values
        about = {
            "model": done.get("model"),
            "recipe": done.get("recipe"),
            "parameters": network.parameter_count if network is not None else None,
            "macs": _macs(network),
            "split": "test",
            "selection": "last",
            "epochs": done.get("epochs"),
            "best": done.get("best"),
        }
        return {**about, **scores}

    with folder.timed("evaluation"):
        metrics: dict[str, Any] = {}
        network, answer = None, None
        if teacher is not None:
            network = teacher.network
            answer = Outputs(*collect_outputs(teacher, test, device=plan.device, world=folder.world))
        elif plan.answers is not None:
            answer = plan.answers.test
        if answer is not None:
            scores = evaluate_predictions(answer.logits, test.labels, plan.groups, class_names=test.class_names)
            metrics["teacher"] = describe("teacher", scores, answer.logits, network, "teacher")
            context = ObjectiveContext(prior=plan.prior, groups=plan.groups, student_dim=1, teacher=profile)
            fixed, how = rectified_answers(answer, plan.options, context)
            scores = evaluate_predictions(fixed, test.labels, plan.groups, class_names=test.class_names)
            metrics["teacher_rectified"] = {
                **describe("teacher_rectified", scores, fixed, network, "teacher"),
                "best": None,
                "recipe": how["words"],
            }
        baselines = {}
        for stage, config, _, _ in plan.recipes if students else ():
            network = _load(plan, folder.part(stage))
            scores, logits = evaluate_network(network, test, plan.groups, device=plan.device, world=folder.world)
            row = describe(stage, scores, logits, network, stage)
            if stage == "student":
                metrics["student"] = row
            else:
                baselines[config.key] = row
        metrics["baselines"] = baselines
        metrics["split_checksum"] = folder.provenance()["split_checksum"]
        if folder.writes:
            with replacing(folder.path / PREDICTIONS) as part:
                np.savez_compressed(part, **arrays)  # type: ignore[arg-type]
        folder.write_json(METRICS, metrics)
    return metrics


def _macs(network: Network | None) -> int | None:
    """Multiply-accumulates of one example; of a sentence of 64 letters, as ``krdistill bench-device`` measures."""
    if network is None:
        return None
    rows = encode_texts([("tail " * 13)[:64]]) if network.kind == "text" else network.example_inputs()
    return multiply_accumulates(network, torch.as_tensor(rows).to(next(network.buffers()).device))


def _export_stage(folder: RunFolder, plan: Plan, events: Events) -> None:
    from .deploy import export_onnx, verify_onnx

    if (folder.path / EXPORT).is_file() and (folder.path / ONNX).is_file():
        events.skipped("export", "already done")
        return
    _stop_here(folder)
    events.stage("export", ONNX)
    with folder.timed("export"):
        network = _load(plan, folder.part("student"))
        export_onnx(network, folder.path / ONNX, class_counts=plan.prior.counts.tolist())
        check = verify_onnx(folder.path / ONNX, network, plan.data.test.inputs)
        folder.write_json(EXPORT, check)
    events.note(check["sentence"])
