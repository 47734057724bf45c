"""krdistill answers: a run's network with another head, stored, and taken as a teacher by another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from command_line import told
from krdistill.answering import HEADS, answer_run, fit_head
from krdistill.bank import load_answers
from krdistill.calibrating import calibrate_run
from krdistill.calibration import Calibrator
from krdistill.config import load_config
from krdistill.dlsa import fit_dlsa
from krdistill.errors import ConfigError, ModelError, RunFolderError
from krdistill.files import read_json
from krdistill.models.network import load_network
from krdistill.pipeline import prepare, run
from krdistill.stages import load_configured_data
from krdistill.training.loop import collect_outputs

pytest.importorskip("zuko")

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "val_fraction": 0.2, "groups": "thirds"},
    "teacher": {"model": "mlp64"},
    "student": {"model": "mlp64"},
    "train": {"epochs": 3, "batch_size": 64, "augmentation": "none", "evaluate_every": 3},
    "recipe": "kd",
    "baselines": [],
    "export": {"onnx": False},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "small"
    run(prepare(load_config(SMALL, [])), folder, report=False)
    return folder


def test_own_answers_are_those_of_the_network(finished: Path, tmp_path: Path) -> None:
    path, found = answer_run(finished, out=tmp_path / "own.npz")
    data = load_configured_data(load_config(str(finished / "config.yaml")).data)
    answers = load_answers(path, data)
    logits, features = collect_outputs(load_network(finished / "teacher"), data.train, device=torch.device("cpu"))
    assert torch.equal(answers.train.logits, logits) and torch.equal(answers.train.feature, features)
    assert answers.val is not None and answers.test is not None
    assert found["test"]["top1"] == pytest.approx(read_json(finished / "metrics.json")["teacher"]["top1"])


@pytest.mark.parametrize("head", [h for h in HEADS if h not in ("own", "dlsa")])
def test_every_head_answers(finished: Path, tmp_path: Path, head: str) -> None:
    path, found = answer_run(finished, head=head, out=tmp_path / "a.npz")
    with np.load(path, allow_pickle=False) as stored:
        assert np.isfinite(stored["logits"]).all()
        assert set(stored.files) == {"logits", "features", "ids", "class_names"}
    assert found["head"] == head and found["test"]["top1"] > 0.3


@pytest.mark.parametrize("method", ["temperature", "head-to-tail", "histogram"])
def test_calibrated_answers_are_what_the_calibrator_says(finished: Path, tmp_path: Path, method: str) -> None:
    plain, _ = answer_run(finished, out=tmp_path / "plain.npz")
    path, found = answer_run(finished, calibrated=method, out=tmp_path / "calibrated.npz")
    with np.load(plain) as a, np.load(path) as b:
        before, after = a["logits"], b["logits"]
        assert np.isfinite(after).all() and np.array_equal(a["features"], b["features"])
    shown = np.exp(after.astype(np.float64))
    np.testing.assert_allclose(shown, Calibrator.from_dict(found["calibrator"])(before), atol=1e-6)
    # It is the calibrator that krdistill calibrate fits to the same network.
    own = calibrate_run(finished, network="teacher", methods=(method,))["methods"][method]["calibrator"]
    assert found["calibrator"] == own


def test_calibrated_answers_teach(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "calibrated.npz"
    code, printed, err = told(capsys, ["answers", str(finished), "--calibrated", "temperature", "--out", str(out)])
    assert code == 0, err
    assert "calibrated by temperature (T " in printed
    given = [("teacher.answers", str(out)), ("name", "taught")]
    metrics = run(prepare(load_config(SMALL, given)), tmp_path / "taught", report=False)
    assert metrics["student"]["top1"] > 0.3


def test_what_cannot_be_calibrated_is_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"calibration method 'platt'.*temperature"):
        answer_run(finished, calibrated="platt", out=tmp_path / "a.npz")
    whole = tmp_path / "whole"
    run(prepare(load_config(SMALL, [("data.val_fraction", "0"), ("train.epochs", "1")])), whole, report=False)
    with pytest.raises(ConfigError, match="no validation part"):
        answer_run(whole, calibrated="temperature", out=tmp_path / "a.npz")
    assert not (tmp_path / "a.npz").exists()


def test_dlsa_teaches_a_student_through_its_answers(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = told(
        capsys, ["answers", str(finished), "--head", "dlsa", "--depth", "1", "--clusters", "12", "--out",
                 str(tmp_path / "dlsa.npz")],
    )  # fmt: skip
    assert code == 0, err
    flat = "".join(out.split())  # lines are broken where a terminal ends
    assert "chosenonthevalidationpart" in flat and "dlsa.npz" in flat and "head" in flat
    data = load_configured_data(load_config(str(finished / "config.yaml")).data)
    answers = load_answers(tmp_path / "dlsa.npz", data)
    assert data.val is not None
    network = load_network(finished / "teacher")
    x, v = (collect_outputs(network, part, device=torch.device("cpu"))[1] for part in (data.train, data.val))
    head, _ = fit_dlsa(x, data.train.labels, 10, depth=1, clusters=12, held_out=(v, data.val.labels), seed=0)
    torch.testing.assert_close(answers.train.logits, head(x), rtol=1e-4, atol=1e-4)
    taught = {**SMALL, "teacher": {"answers": str(tmp_path / "dlsa.npz")}, "recipe": "krdistill"}
    run(prepare(load_config(taught, [])), tmp_path / "taught", report=False)
    metrics = read_json(tmp_path / "taught" / "metrics.json")
    assert metrics["student"]["top1"] > 0.3


def test_what_cannot_be_done_is_said(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        ([str(finished), "--head", "dsla"], "Unknown head 'dsla'. Did you mean 'dlsa'"),
        ([str(finished), "--network", "teachr"], "Did you mean 'teacher'"),
        ([str(finished), "--out", str(tmp_path / "a.csv")], "expected a .npz file"),
        ([str(finished), "--depth", "1"], "--depth is for --head dlsa"),
        ([str(tmp_path)], "is no run folder"),
        ([str(finished), "--head", "dlsa", "--clusters", "99999"], "99999 clusters for"),
    ):
        code, _, err = told(capsys, ["answers", *args])
        assert code == 2 and words in err, err
    assert not list(finished.glob("answers-*"))


def test_heads_that_choose_need_held_out_rows_and_others_a_linear_layer() -> None:
    x, y = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
    for name in ("dlsa", "tau-norm"):
        with pytest.raises(ConfigError, match=r"data\.val_fraction"):
            fit_head(name, nn.Linear(3, 3), x, y, 3)
    with pytest.raises(ModelError, match="plain linear layer"):
        fit_head("lws", None, x, y, 3)
    own = nn.Linear(3, 3)
    before = own.weight.detach().clone()
    fit_head("lws", own, x, y, 3)
    fit_head("tau-norm", own, x, y, 3, held_out=(x, y))
    assert torch.equal(own.weight, before)


def test_data_that_changed_are_refused(finished: Path, tmp_path: Path) -> None:
    split = (finished / "split.json").read_text()
    try:
        checksum = read_json(finished / "split.json")["checksum"]
        (finished / "split.json").write_text(split.replace(checksum, "0" * len(checksum)))
        with pytest.raises(RunFolderError, match="changed since"):
            answer_run(finished, out=tmp_path / "a.npz")
    finally:
        (finished / "split.json").write_text(split)
