"""The stage that stores the teacher's answers, for one run or for many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bank import BankKey, Coding, ViewBank, build_bank, open_bank
from ..bank.plan import AUTO_BYTES
from ..config import load_config
from ..data.augment import Augmentation, augmentation_of
from ..errors import RunFolderError
from ..events import Events
from ..kinds import NOUNS
from ..models.teacher import Teacher
from ..runfolder import BANK, CONFIG, DONE, RunFolder
from .folder import stop_here
from .plan import Plan, given_teacher, load_stored, prepare


def bank_stage(folder: RunFolder, plan: Plan, teacher: Teacher, events: Events) -> ViewBank | None:
    """Stores the teacher's answers where that was asked for, or pays."""
    config, views = plan.config.bank, plan.bank_views
    if not views or all(folder.done(stage) is not None for stage in plan.bank_users):
        return None
    augment, coding = bank_parts(plan, teacher)
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
        stop_here(folder)

    with folder.timed("bank"):
        bank = build_bank(
            teacher, plan.data.train, augment, views=views, root=bank_root(folder, plan), seed=plan.config.seed,
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
    network = given_teacher(plan)
    assert network is not None  # teacher.run was given
    teacher = Teacher(network, class_names=plan.prior.class_names)
    root, views, (augment, coding) = Path(options["folder"]), int(options["views"]), bank_parts(plan, teacher)
    size = views * len(plan.data.train) * coding.row_bytes
    noun = NOUNS[plan.data.train.kind]
    events.stage("bank", f"{views} views of {len(plan.data.train):,} {noun}, {size / 2**20:,.1f} MiB")
    bank = build_bank(
        teacher, plan.data.train, augment, views=views, root=root, seed=plan.config.seed, coding=coding,
        device=plan.device, on_step=lambda done, total: events.progress("bank", done, total),
    )  # fmt: skip
    return bank


def bank_root(folder: RunFolder, plan: Plan) -> Path:
    return Path(plan.config.bank.folder) if plan.config.bank.folder else folder.path / BANK


def bank_parts(plan: Plan, teacher: Teacher) -> tuple[Augmentation, Coding]:
    """Which views a plan's bank holds, and how."""
    config = plan.config.bank
    augment = augmentation_of(plan.config.student.train.augmentation, plan.data.train)
    dim = teacher.feature_dim if config.features else 0
    return augment, Coding(plan.prior.num_classes, dim, config.dtype, config.top_k)


def bank_is_there(folder: RunFolder, plan: Plan, teacher: Teacher) -> bool:
    """Whether the bank stage is behind us: nobody is left to use a bank, or it is built."""
    if all(folder.done(stage) is not None for stage in plan.bank_users):
        return True
    if folder.done("teacher") is None:
        return False
    known = Teacher(load_stored(plan, folder.part("teacher")), class_names=plan.prior.class_names)
    augment, coding = bank_parts(plan, known)
    key = BankKey.of(known, plan.data.train, augment, plan.config.seed, coding)
    return open_bank(bank_root(folder, plan), key, plan.bank_views) is not None
