"""`krdistill bank` on a real run, and the run that uses what it built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from krdistill.cli import main
from krdistill.config import load_config
from krdistill.errors import ConfigError, RunFolderError
from krdistill.pipeline import build_bank_of, prepare, run

RUN: dict[str, Any] = {
    "name": "first",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "groups": "thirds"},
    "teacher": {"model": "resnet8w8"},
    "student": {"model": "resnet8w8"},
    "train": {"epochs": 2, "batch_size": 64, "augmentation": "crop-only"},
    "recipe": "kd",
    "export": {"onnx": False},
}


def _call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    try:
        main(args)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "first"
    run(prepare(load_config(RUN, [("bank.views", "0")])), folder)
    return folder


def test_a_bank_is_built_shown_and_used(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    banks = tmp_path / "banks"
    code, said = _call(capsys, "bank", "build", str(first), "--views", "2", "--folder", str(banks))
    assert code == 0 and "2 views" in said, said
    code, said = _call(capsys, "bank", "show", str(banks))
    assert code == 0 and "whole" in said and "RandomCrop" in said
    config = load_config(
        RUN, [("teacher", f"{{run: {first}}}"), ("bank.views", "2"), ("bank.folder", str(banks)), ("name", "second")]
    )
    second = run(prepare(config), tmp_path / "second")
    known = json.loads((first / "metrics.json").read_text())
    assert len([p for p in banks.iterdir() if p.is_dir()]) == 1  # the one that was built
    assert json.loads((tmp_path / "second" / "provenance.json").read_text())["bank"]["views"] == 2
    # as many views as epochs, the same seed: the same training, to float16
    assert second["student"]["nll"] == pytest.approx(known["student"]["nll"], rel=0.02)


def test_a_bank_that_nobody_asked_for_is_not_kept(tmp_path: Path) -> None:
    config = load_config({**RUN, "baselines": ["kd-balanced"]})
    run(prepare(config), tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "provenance.json").read_text())
    assert facts["bank"]["views"] == 2 and "bank" in facts["seconds"]
    assert not (tmp_path / "run" / "bank").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("bank.views", "4"), ("student.train.mixup", "0.3")], "mixed images cannot be stored"),
        ([("bank.views", "4"), ("bank.features", "false"), ("recipe", "krdistill")], "needs the teacher's features"),
        ([("bank.views", "-1")], r"bank\.views"),
        ([("bank.views", "many")], r"bank\.views"),
        ([("bank.top_k", "0")], r"bank\.top_k"),
        ([("bank.dtype", "int8")], r"bank\.dtype"),
        ([("bank.view", "4")], "views"),
    ],
)
def test_wrong_banks_are_refused_before_anything_runs(overrides: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(load_config(RUN, overrides))


def test_mistakes_on_the_command_line(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for args, words in (
        (["bank", "build", str(tmp_path / "nowhere"), "--views", "2", "--folder", str(tmp_path)], "No trained teacher"),
        (["bank", "build", str(first), "--views", "0", "--folder", str(tmp_path)], "views"),
        (["bank", "build", str(first), "--views", "2", "--folder", str(tmp_path), "--top-k", "10"], "from 1 to 9"),
        (["bank", "show", str(tmp_path)], "No bank in"),
        (["bank", "shov", str(tmp_path)], "Did you mean 'show'"),
    ):
        code, said = _call(capsys, *args)
        assert code == 2 and words in said, said
    with pytest.raises(RunFolderError, match="No trained teacher"):
        build_bank_of(tmp_path, {"views": 1, "folder": str(tmp_path)})
