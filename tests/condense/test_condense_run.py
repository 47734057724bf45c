"""From a long-tailed set to a student trained on the small one, by the command line and by functions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from command_line import told
from krdistill.bank import load_answers
from krdistill.condense import CondenseOptions, condense, soft_labels
from krdistill.condense.making import class_confidence
from krdistill.config import load_config
from krdistill.data import ImageData, load_data
from krdistill.data.augment import build_augmentation
from krdistill.errors import ArgumentError, ConfigError, RunFolderError
from krdistill.events import Events
from krdistill.outputs import Outputs
from krdistill.pipeline import prepare, run_teacher

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "groups": "thirds"},
    "teacher": {"model": "mlp64"},
    "student": {"model": "mlp64"},
    "train": {"epochs": 3, "batch_size": 64, "augmentation": "crop-only", "evaluate_every": 3},
    "export": {"onnx": False},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("condense") / "teacher"
    run_teacher(prepare(load_config({**SMALL, "recipe": "kd"}, [])), folder)
    return folder


def given(teacher: Path) -> Any:
    return load_config({**SMALL, "teacher": {"model": "mlp64", "run": str(teacher)}}, [])


class PixelTeacher(nn.Module):
    """Two classes; the first logit says how bright an image is."""

    def forward(self, images: Tensor) -> Outputs:
        bright = images.float().mean((1, 2, 3)) / 10 - 10
        return Outputs(torch.stack([bright, torch.zeros_like(bright)], 1), bright.unsqueeze(1))


def bright(values: Sequence[int], labels: Sequence[int]) -> ImageData:
    pixels = torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 8, 8, 1).contiguous()
    return ImageData.from_arrays(pixels, torch.tensor(labels), ["a", "b"])


def test_adsa_by_hand() -> None:
    """Margins of 3 and 1 for the own class are even where 3 - tau log 4 = 1 + tau log 4."""
    data, log_prior = bright([130, 90, 90], [0, 1, 1]), torch.tensor([0.8, 0.2]).log()
    plain, record = soft_labels(PixelTeacher(), data, log_prior, views=0)
    assert torch.allclose(plain, torch.tensor([[3.0, 0], [-1, 0], [-1, 0]]))
    expected = [1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-1))]
    assert class_confidence(plain, data.labels).tolist() == pytest.approx(expected)
    assert record["tau"] == 0 and record["spread"]["before"] == pytest.approx((expected[0] - expected[1]) / 2)
    even, record = soft_labels(PixelTeacher(), data, log_prior, rectify="adsa", views=0)
    assert record["tau"] == pytest.approx(1 / math.log(4), abs=1e-3)
    assert torch.allclose(even[:, 0] - even[:, 1], torch.tensor([2.0, -2.0, -2.0]), atol=2e-3)
    assert record["spread"]["after"] == pytest.approx(0, abs=1e-3)
    assert record["top1"] == {"before": 1.0, "after": 1.0}


def test_labels_are_means_over_replayed_views() -> None:
    data, augment = bright([200, 100, 40], [0, 1, 1]), build_augmentation("crop-only", 8)
    found, _ = soft_labels(PixelTeacher(), data, torch.zeros(2), views=3, augment=augment, seed=4)
    batch = data.images.permute(0, 3, 1, 2)
    views = [PixelTeacher()(augment(batch, torch.arange(3), seed=4, epoch=v)).logits for v in range(3)]
    assert torch.allclose(found, torch.stack(views).mean(0), atol=1e-5)
    assert not torch.allclose(views[0], views[1])
    with pytest.raises(ArgumentError, match="augment"):
        soft_labels(PixelTeacher(), data, torch.zeros(2), views=1)


def test_from_the_command_line_to_a_student(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "small.yaml", tmp_path / "set"
    config.write_text(json.dumps(SMALL))
    args = ["condense", str(config), "--ipc", "6", "--method", "herding", "--rectify", "adsa", "--teacher",
            str(teacher), "--out", str(out)]  # fmt: skip
    code, printed, err = told(capsys, args)
    assert code == 0, err
    flat = "".join(printed.split())  # lines are broken where a terminal ends
    assert "spreadoftheclassconfidences" in flat and f"krdistillrun{out / 'run.yaml'}" in flat
    record = json.loads((out / "condense.json").read_text())
    whole = load_data("digits", profile="exp", imbalance_factor=20)
    small = load_data(out / "condensed.npz")
    assert small.train.counts().tolist() == [6] * 10 and small.class_names == whole.class_names
    assert torch.equal(small.test.inputs, whole.test.inputs) and torch.equal(small.test.labels, whole.test.labels)
    place = {name: i for i, name in enumerate(whole.train.ids)}
    rows = torch.tensor([place[name] for name in record["from"]["ids"]])
    assert torch.equal(small.train.inputs, whole.train.inputs[rows])
    assert torch.equal(small.train.labels, whole.train.labels[rows])
    answers = load_answers(out / "labels.npz", small)
    after = class_confidence(answers.train.logits, small.train.labels)
    assert float(after.std(correction=0)) == pytest.approx(record["labels"]["spread"]["after"], abs=1e-6)
    assert record["labels"]["spread"]["after"] < record["labels"]["spread"]["before"]
    before = (out / "condense.json").stat().st_mtime_ns
    code, printed, err = told(capsys, args)
    assert code == 0 and "already done" in printed and (out / "condense.json").stat().st_mtime_ns == before
    code, printed, err = told(capsys, [*args, "--seed", "1"])
    assert code == 2 and "holds another request" in err and "seed: 0 -> 1" in err

    student = tmp_path / "student"
    longer = ["--student.train.epochs", "60", "--student.train.batch_size", "12"]
    code, printed, err = told(capsys, ["run", str(out / "run.yaml"), "--out", str(student), *longer])
    assert code == 0, err
    metrics = json.loads((student / "metrics.json").read_text())
    assert metrics["student"]["images"] == len(whole.test) and metrics["student"]["top1"] > 0.3
    each = np.array(metrics["student"]["per_class"])
    groups = metrics["student"]["groups"]
    assert groups["head"]["accuracy"] == pytest.approx(each[:3].mean()) and groups["head"]["classes"] == 3
    assert groups["tail"]["accuracy"] == pytest.approx(each[7:].mean())
    assert set(metrics["baselines"]) == {"none"} and "teacher" not in metrics


def test_an_interrupted_matching_goes_on(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("krdistill.condense.making._SAVE_SECONDS", 0.0)

    class Stops(Events):
        def progress(self, name: str, done: int, total: int) -> None:
            if name == "condense" and done == 3:
                raise KeyboardInterrupt

    class Hears(Events):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    options = CondenseOptions(ipc=20, method="dm", iterations=4, views=1)
    with pytest.raises(KeyboardInterrupt):
        condense(given(teacher), options, tmp_path / "b", events=Stops())
    heard = Hears()
    second = condense(given(teacher), options, tmp_path / "b", events=heard)
    first = condense(given(teacher), options, tmp_path / "a")
    assert first["files"] == second["files"]
    assert first["matching"] == second["matching"] and first["matching"]["steps"] == 4
    assert "going on after step 2" in heard.notes
    assert any("have fewer than 20 images, which start from noisy copies" in text for text in heard.notes)
    assert not (tmp_path / "b" / "matching.pt").exists()
    assert load_data(tmp_path / "b" / "condensed.npz").train.counts().tolist() == [20] * 10


def test_a_teacher_is_trained_where_none_is_given(tmp_path: Path) -> None:
    options = CondenseOptions(ipc=3, method="herding", views=2)
    first = condense(load_config(SMALL, []), options, tmp_path / "a")
    assert (tmp_path / "a" / "teacher" / "metrics.json").is_file()
    second = condense(given(tmp_path / "a" / "teacher"), options, tmp_path / "b")
    assert first["files"] == second["files"] and first["from"] == second["from"]
    assert not second["notes"]
    state = tmp_path / "c" / "matching.pt"
    with pytest.raises(RunFolderError, match="holds something else"):
        state.parent.mkdir()
        state.write_bytes(b"broken")
        condense(given(tmp_path / "a" / "teacher"), CondenseOptions(ipc=3, iterations=1), state.parent)
    state.unlink()
    condense(given(tmp_path / "a" / "teacher"), CondenseOptions(ipc=3, iterations=1), state.parent)
    (state.parent / "labels.npz").unlink()
    state.write_bytes(b"broken")
    with pytest.raises(RunFolderError, match="is damaged"):
        condense(given(tmp_path / "a" / "teacher"), CondenseOptions(ipc=3, iterations=1), state.parent)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["digits-lt", "--ipc", "0", "--method", "random"], "ipc: expected a whole number >= 1"),
        (["digits-lt", "--ipc", "1", "--method", "kmeans"], "one of 'random', 'herding', 'dm'"),
        (["digits-lt", "--ipc", "1", "--method", "random", "--rectify", "no"], "one of 'none', 'adsa'"),
        (["digits-lt", "--ipc", "1", "--method", "random", "--iterations", "5"], "leave them out for 'random'"),
        (["digits-lt", "--ipc", "5000", "--method", "herding"], "nothing would be left out"),
        (["digits", "--ipc", "1", "--method", "random"], "No teacher"),
        (["digits-lt", "--ipc", "1", "--method", "dm", "--teacher", "nowhere"], "no folder 'nowhere'"),
        (["features-lt", "--ipc", "1", "--method", "random"], "works on images"),
    ],
)
def test_wrong_requests(args: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = told(capsys, ["condense", *args, "--out", str(tmp_path / "out")])
    assert code == 2 and words in err, err
    assert not (tmp_path / "out").exists()


def test_other_folders_and_teachers(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "a.jpg").write_bytes(b"")
    options = CondenseOptions(ipc=1, method="random")
    with pytest.raises(RunFolderError, match="holds something else"):
        condense(given(teacher), options, other)
    with pytest.raises(RunFolderError, match="holds something else"):
        condense(given(teacher), options, other / "a.jpg")
    assert [p.name for p in other.iterdir()] == ["a.jpg"]
    answers = load_config({**SMALL, "teacher": {"model": "mlp64", "answers": "a.npz"}}, [])
    with pytest.raises(ConfigError, match="give a teacher that can be asked"):
        condense(answers, options, tmp_path / "c")
    out = tmp_path / "whole"
    args = ["condense", "digits", "--ipc", "2", "--method", "random", "--teacher", str(teacher), "--out", str(out)]
    code, printed, err = told(capsys, [*args, "--views", "0", "--student.model", "mlp64"])
    assert code == 0, err
    assert "another split than is condensed here" in printed
    (out / "condense.json").write_text("{")
    code, _, err = told(capsys, [*args, "--views", "0", "--student.model", "mlp64"])
    assert code == 2 and "is damaged" in err
