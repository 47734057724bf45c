"""Every recipe trains on long-tailed digits through the command line, as a user would start it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from krdistill.cli import main
from krdistill.config import HEAD_OF, Classification, TrainConfig
from krdistill.data import load_data
from krdistill.models.network import build_network
from krdistill.recipes import list_recipes, recipe
from krdistill.sampling import SAMPLINGS, Sampling, draw_shares
from krdistill.stages import build_task, measure
from krdistill.training.loop import Trainer

SMALL = (
    "--teacher.model", "resnet8", "--student.model", "resnet8w8", "--train.epochs", "2", "--train.evaluate_every", "2",
    "--data.groups", "thirds", "--baselines", "[]", "--export.onnx", "false",
)  # fmt: skip


def _run(out: Path, *args: str) -> dict:  # type: ignore[type-arg]
    main(["run", "digits-lt", *SMALL, "--out", str(out), *args])
    return json.loads((out / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught") / "run"
    _run(folder, "--recipe", "none", "--teacher.train.epochs", "8")
    return folder


@pytest.mark.parametrize("name", [r.name for r in list_recipes()])
def test_recipe(name: str, taught: Path, tmp_path: Path) -> None:
    small = ("--recipe.negatives", "64") if name == "crd" else ()
    metrics = _run(tmp_path / "run", "--recipe", name, *small, "--teacher.run", str(taught))
    assert metrics["student"]["recipe"] == name and metrics["student"]["epochs"] == 2
    assert 0 <= metrics["student"]["top1"] <= 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    student = [line["loss"]["total"] for line in lines if line["stage"] == "student"]
    assert len(student) == 2
    if name not in {"lfme", "crd"}:  # their losses change while they train: experts are let go, memories fill
        assert student[1] < student[0] * 1.05
    if name == "lfme":
        assert {line["stage"] for line in lines} >= {"experts/head", "experts/medium", "experts/tail"}


@pytest.mark.parametrize("name", [n for n in Classification.__args__ if n != "cross-entropy"])  # type: ignore[attr-defined]
def test_classification_loss(name: str, taught: Path, tmp_path: Path) -> None:
    head = HEAD_OF.get(name, "linear")
    metrics = _run(
        tmp_path / "run", "--recipe", "none", "--recipe.classification", name, "--student.head", head, "--teacher.run",
        str(taught),
    )  # fmt: skip
    assert metrics["student"]["top1"] > 0.1


@pytest.mark.parametrize("method", ["balanced-softmax", "crt", "lws", "ncm", "tau-norm"])
def test_second_stage(method: str, taught: Path, tmp_path: Path) -> None:
    held = ("--data.val_fraction", "0.2") if method == "tau-norm" else ("--teacher.run", str(taught))
    metrics = _run(tmp_path / "run", "--recipe", "none", "--student.second_stage", method, *held)
    assert metrics["student"]["top1"] > 0.1
    done = json.loads((tmp_path / "run" / "student" / "done.json").read_text(encoding="utf-8"))
    assert done["second_stage"] == method
    assert ("tau" in done) == (method == "tau-norm")


@pytest.mark.parametrize(
    ("given", "drawn"), [((), "square-root"), (("--student.train.sampler", "progressively-balanced"), None)]
)
def test_images_are_drawn_as_the_recipe_or_the_user_says(
    given: tuple[str, ...], drawn: str | None, taught: Path, tmp_path: Path
) -> None:
    metrics = _run(tmp_path / "run", "--recipe", "krdistill", "--teacher.run", str(taught), *given)
    done = json.loads((tmp_path / "run" / "student" / "done.json").read_text(encoding="utf-8"))
    assert done["sampler"] == (drawn or given[-1]) and metrics["student"]["top1"] > 0.1


def test_the_prior_of_the_draws_is_in_the_objective_and_the_draws_are_its_own() -> None:
    data = load_data("digits", profile="exp", imbalance_factor=10, n_max=30)
    prior, groups = measure(data, "thirds")
    about: dict[str, Any] = {"class_names": data.train.class_names, "images": data.train.inputs}
    entry = recipe("none")
    options = entry.resolve({"classification": "balanced-softmax"})
    sampler: Sampling
    for sampler in SAMPLINGS:  # type: ignore[assignment]
        student = build_network("resnet8w8", **about)
        task = build_task(entry, options, student, data, prior, groups, sampler=sampler)
        assert task.objective.sampler == sampler
        loss = task.objective.terms[0].module  # type: ignore[union-attr]
        assert torch.allclose(loss.log_prior, draw_shares(sampler, prior.counts).log().float())
        trainer = Trainer(task, data.train, TrainConfig(epochs=2, sampler="recipe"), seed=0, device=torch.device("cpu"))
        assert trainer.sampler == sampler


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--recipe", "none", "--recipe.classification", "ldam"), "needs head 'cosine'"),
        (("--recipe", "none", "--student.head", "etf"), "dot-regression"),
        (("--student.second_stage", "tau-norm"), "data.val_fraction"),
        (("--recipe", "simkd", "--teacher.classification", "ldam", "--teacher.head", "cosine"), "linear teacher head"),
        (("--recipe", "none", "--recipe.classification", "focal", "--train.label_smoothing", "0.1"), "label_smoothing"),
    ],
)
def test_what_does_not_go_together_is_said(
    args: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        _run(tmp_path / "run", "--train.epochs", "1", *args)
    assert stop.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
