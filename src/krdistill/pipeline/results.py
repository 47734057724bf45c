"""The last stages: what every network is worth on the test part, and the file for the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation import evaluate_predictions, multiply_accumulates, prediction_record
from ..events import Events
from ..files import read_json, replacing
from ..kinds import NOUNS, encode_texts
from ..models.network import Network
from ..models.teacher import Teacher
from ..objective import ObjectiveContext, TeacherProfile
from ..outputs import Outputs
from ..runfolder import EXPORT, METRICS, ONNX, PREDICTIONS, RunFolder
from ..stages import evaluate_network, rectified_answers
from ..training.loop import collect_outputs
from .folder import stop_here
from .plan import Plan, load_stored


def evaluation_stage(
    folder: RunFolder, plan: Plan, teacher: Teacher | None, profile: TeacherProfile, events: Events,
    *, students: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates teacher, baselines and student on the test part, and writes metrics and predictions."""
    if (folder.path / METRICS).is_file() and (folder.path / PREDICTIONS).is_file():
        events.skipped("evaluation", "already done")
        done: dict[str, Any] = read_json(folder.path / METRICS)
        return done
    test = plan.data.test
    stop_here(folder)
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
            context = ObjectiveContext(
                prior=plan.prior, groups=plan.groups, student_dim=1, teacher=profile, device=plan.device
            )
            fixed, how = rectified_answers(answer, plan.options, context)
            scores = evaluate_predictions(fixed, test.labels, plan.groups, class_names=test.class_names)
            metrics["teacher_rectified"] = {
                **describe("teacher_rectified", scores, fixed, network, "teacher"),
                "best": None,
                "recipe": how["words"],
            }
        baselines = {}
        for stage, config, _, _ in plan.recipes if students else ():
            network = load_stored(plan, folder.part(stage))
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


def export_stage(folder: RunFolder, plan: Plan, events: Events) -> None:
    """Writes the student as an ONNX file, and checks it on the test part."""
    from ..deploy import export_onnx, verify_onnx

    if (folder.path / EXPORT).is_file() and (folder.path / ONNX).is_file():
        events.skipped("export", "already done")
        return
    stop_here(folder)
    events.stage("export", ONNX)
    with folder.timed("export"):
        network = load_stored(plan, folder.part("student"))
        export_onnx(network, folder.path / ONNX, class_counts=plan.prior.counts.tolist())
        check = verify_onnx(folder.path / ONNX, network, plan.data.test.inputs)
        folder.write_json(EXPORT, check)
    events.note(check["sentence"])
