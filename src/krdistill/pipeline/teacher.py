"""The stages about the teacher: trained or taken over, and whom it favours."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..errors import RunFolderError
from ..evaluation import diagnose_teacher, predictions
from ..events import Events
from ..files import check_unpacked, read_json, replacing
from ..kinds import NOUNS
from ..models.teacher import Teacher
from ..objective import ObjectiveContext, TeacherProfile
from ..outputs import Outputs
from ..runfolder import DIAGNOSIS, DONE, PROFILE, PROVENANCE, RunFolder
from ..stages import profile_answers, profile_teacher, rectified_answers, train_teacher
from ..training.loop import collect, collect_outputs
from .folder import keep_network, stop_here
from .plan import Plan, given_teacher, load_stored, model_asked, teacher_runs


def teacher_stage(folder: RunFolder, plan: Plan, events: Events) -> Teacher:
    """The teacher, trained or taken from where the configuration says."""
    config = plan.config.teacher
    record = folder.done("teacher")
    if record is not None:
        events.skipped("teacher", f"{record['model']}, already trained")
        return Teacher(load_stored(plan, folder.part("teacher")), class_names=plan.prior.class_names)
    given = given_teacher(plan)
    if given is not None:
        events.stage("teacher", f"taken from {config.file or ', '.join(teacher_runs(config))}")
        keep_network(folder, "teacher", given)
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
            plan.data, plan.prior, plan.groups, model=model_asked(config), train=config.train,
            classification=config.classification, head=config.head, second_stage=config.second_stage,
            seed=plan.config.seed, device=plan.device, world=folder.world, events=events, store=folder,
        )  # fmt: skip
        keep_network(folder, "teacher", trained.network)
        folder.finish("teacher", trained.record)
    return Teacher(trained.network, class_names=plan.prior.class_names)


def diagnosis_stage(
    folder: RunFolder, plan: Plan, teacher: Teacher | None, events: Events, *, again: bool = True
) -> TeacherProfile:
    """What rectification needs to know of the teacher, and whom it favours; without ``again`` it may be taken over."""
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
    stop_here(folder)
    events.stage("diagnosis", "whom does the teacher favour?")
    with folder.timed("diagnosis"):
        if teacher is not None:
            where: dict[str, Any] = {"device": plan.device, "world": folder.world}
            features, predicted = collect(
                teacher, plan.data.train, lambda out: (out.feature.float(), predictions(out.logits)), **where
            )
            profile = profile_teacher(teacher, plan.data, features=features, seed=plan.config.seed, **where)
            answer = Outputs(*collect_outputs(teacher, plan.data.test, **where))
        else:
            assert plan.answers is not None
            profile = profile_answers(plan.answers, plan.data)
            predicted = predictions(plan.answers.train.logits)
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
        context = ObjectiveContext(
            prior=plan.prior, groups=plan.groups, student_dim=1, teacher=profile, device=plan.device
        )
        rectified, how = rectified_answers(answer, plan.options, context)
        diagnosis = diagnose_teacher(
            answer.logits, plan.data.test.labels, plan.prior, plan.groups, rectified_logits=rectified,
            train_predictions=predicted, train_labels=plan.data.train.labels,
        )  # fmt: skip
        folder.write_json(
            f"teacher/{DIAGNOSIS}",
            {**diagnosis, "rectified_by": how, "views": profile.views},
        )
    for sentence in diagnosis["verdict"]:
        events.note(sentence)
    return profile


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
