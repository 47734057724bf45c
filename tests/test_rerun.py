"""`krdistill rerun` on a real run: the same numbers, and words where they are others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krdistill.cli import main
from krdistill.config import load_config
from krdistill.errors import RunFolderError
from krdistill.pipeline import prepare, run
from krdistill.reproduction import circumstances, compare_runs

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 10, "groups": "thirds", "n_max": 40},
    "teacher": {"model": "resnet8w8"},
    "student": {"model": "resnet8w8"},
    "train": {"epochs": 1, "batch_size": 32, "augmentation": "crop-only", "evaluate_every": 1},
    "recipe": "kd",
    "export": {"onnx": False},
}


def _call(*args: str) -> int:
    try:
        main(list(args))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run(prepare(load_config(TINY)), folder)
    return folder


@pytest.fixture
def known(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "tiny")


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_run_done_again_is_equal_bit_for_bit(
    known: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krdistill.runfolder._git_hash", lambda: "0123456789ab")
    _edit(known / "provenance.json", git="0123456789ab", processor="another one", krdistill="0.0.1")
    threads = torch.get_num_threads()
    assert _call("rerun", str(known)) == 0
    said = capsys.readouterr().out
    assert "otherwise than in the first run:\n  version of krdistill: 0.0.1 then" in said
    assert "processor: another one then" in said and "commit" not in said
    assert "equal to" in said and "bit for bit" in said
    again = known.with_name("tiny-rerun")
    for name in ("metrics.json", "student/model.safetensors", "teacher/model.safetensors"):
        assert (again / name).read_bytes() == (known / name).read_bytes()
    assert json.loads((again / "provenance.json").read_text())["threads"] == threads == torch.get_num_threads()
    # Called once more, it finds the new run done, and compares. Then with other numbers in the first:
    metrics = json.loads((known / "metrics.json").read_text())
    metrics["student"]["top1"] += 0.25
    (known / "metrics.json").write_text(json.dumps(metrics))
    assert _call("rerun", str(known), "--out", str(again)) == 4
    said = capsys.readouterr().out
    assert f"differs from {known}:\n" in said
    assert "metrics.json: student.top1:" in said and "(-0.25)" in said and "what was otherwise:" in said


def test_number_of_threads_is_the_runs_own(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = 2 if torch.get_num_threads() == 1 else 1
    _edit(known / "provenance.json", threads=other)
    assert _call("rerun", str(known)) in (0, 4)  # the weights are those of the machine's own sums
    assert json.loads((known.with_name("tiny-rerun") / "provenance.json").read_text())["threads"] == other
    assert torch.get_num_threads() != other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / "metrics.json").unlink(), "No metrics.json"),
        (lambda run: (run / "config.yaml").unlink(), "No config.yaml"),
        (lambda run: (run / "provenance.json").unlink(), "No provenance.json"),
        (lambda run: (run / "provenance.json").write_text("{"), "damaged"),
        (lambda run: (run / "provenance.json").write_text("[]"), "damaged"),
        (lambda run: _edit(run / "provenance.json", processes=2), "torchrun --nproc-per-node 2 -m krdistill rerun"),
        (lambda run: _edit(run / "provenance.json", split_checksum="0" * 64), "The data are others"),
        (lambda run: (run / "config.yaml").write_text("teecher: {}"), "Did you mean 'teacher'"),
    ],
)
def test_what_cannot_be_done_again_is_refused(
    known: Path, change: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(known)
    assert _call("rerun", str(known)) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
    assert not known.with_name("tiny-rerun").exists()


def test_the_run_itself_is_no_place_for_its_rerun(known: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("rerun", str(known), "--out", str(known)) == 2
    assert "is the run itself" in capsys.readouterr().err


def test_differences_are_listed_with_figures(known: Path, tmp_path: Path) -> None:
    other = shutil.copytree(known, tmp_path / "other")
    exported = other / "exports" / "student-safetensors" / "model.safetensors"  # asked for afterwards: no part of a run
    exported.parent.mkdir(parents=True)
    exported.write_bytes(b"something")
    assert compare_runs(known, other) == []
    with np.load(other / "predictions.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["student.prediction"][:3] = (arrays["student.prediction"][:3] + 1) % 10
    np.savez_compressed(other / "predictions.npz", **arrays)
    weights = (other / "student" / "model.safetensors").read_bytes()
    (other / "student" / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    shutil.rmtree(other / "teacher")
    total = len(arrays["labels"])
    assert compare_runs(known, other) == [
        f"predictions.npz: 3 of {total:,} values of student.prediction",
        "student/model.safetensors: other weights",
        f"teacher/model.safetensors: not in {other}",
    ]
    metrics = json.loads((known / "metrics.json").read_text())
    metrics["student"]["per_class"][2] = None
    (other / "metrics.json").write_text(json.dumps(metrics))
    assert any("student.per_class[2]" in line and "now none" in line for line in compare_runs(known, other))
    (other / "predictions.npz").write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(RunFolderError, match="damaged"):
        compare_runs(known, other)


def test_circumstances_are_said_in_words(known: Path) -> None:
    then = json.loads((known / "provenance.json").read_text())
    clean = {**then, "git": "a" * 12}
    assert circumstances(clean, clean) == []
    now = {**clean, "threads": 7, "packages": {**then["packages"], "numpy": "0.1"}, "inputs": {"t.onnx": "ff"}}
    assert circumstances(clean, now) == [
        f"package numpy: {then['packages']['numpy']} then, 0.1 now",
        f"threads: {then['threads']} then, 7 now",
        "file t.onnx: none then, ff now",
    ]
    old = {k: v for k, v in clean.items() if k != "processes"}
    assert circumstances(old, clean) == ["processes: not known of the first run, now 1"]
    assert any("had changes" in line for line in circumstances({**clean, "git": "abc-dirty"}, clean))


def test_provenance_keeps_what_a_run_was_begun_with(known: Path, finished: Path) -> None:
    plan = prepare(load_config(TINY))
    _edit(known / "provenance.json", torch="1.0", krdistill="0.0.1")
    before = json.loads((known / "provenance.json").read_text())
    run(plan, known)  # all numbers are there: nothing of them is made with what is here now
    after = json.loads((known / "provenance.json").read_text())
    assert {k: v for k, v in after.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}
    (known / "metrics.json").unlink()
    run(plan, known)
    after = json.loads((known / "provenance.json").read_text())
    assert after["torch"] == torch.__version__ and after["earlier"] == [{"krdistill": "0.0.1", "torch": "1.0"}]
    assert any("begun otherwise than it was ended" in line for line in circumstances(after, after))


def test_files_that_a_configuration_names_are_in_its_provenance(finished: Path, tmp_path: Path) -> None:
    config = {**TINY, "teacher": {"run": str(finished)}, "recipe": "kd"}
    run(prepare(load_config(config)), tmp_path / "second")
    inputs = json.loads((tmp_path / "second" / "provenance.json").read_text())["inputs"]
    assert [*inputs] == [str(finished / "teacher" / "model.safetensors")] and len(next(iter(inputs.values()))) == 64


def test_a_folder_of_an_older_version_goes_on_with_the_defaults_of_newer_keys(known: Path) -> None:
    text = (known / "config.yaml").read_text()
    assert "  cut_seed: 0\n" in text
    (known / "config.yaml").write_text(text.replace("  cut_seed: 0\n", ""))
    run(prepare(load_config(TINY)), known)  # is not refused
    (known / "config.yaml").write_text(text.replace("  cut_seed: 0\n", "  cut_seed: 1\n"))
    with pytest.raises(RunFolderError, match=r"data\.cut_seed: 1 -> 0"):
        run(prepare(load_config(TINY)), known)
