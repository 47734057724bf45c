"""The whole job on real digits, small: what lands in the run folder, what is not done twice, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from krdistill import objective, stages
from krdistill.config import load_config
from krdistill.distiller import Distiller
from krdistill.errors import ArgumentError, ConfigError, DataError, KrdistillError, ModelError, RunFolderError
from krdistill.events import Events
from krdistill.models.network import load_network
from krdistill.pipeline import estimate_seconds, prepare, run
from krdistill.pipeline import teacher as teacher_stages
from krdistill.runfolder import RunFolder
from krdistill.training import loop

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "groups": "thirds"},
    "teacher": {"model": "resnet14"},
    "student": {"model": "resnet8"},
    "train": {"epochs": 2, "batch_size": 64, "augmentation": "crop-only", "evaluate_every": 1},
    "recipe": {"name": "krdistill", "prior": "label", "correction": "lift", "rectify": "blend"},
    "baselines": ["none", "kd"],
    "export": {"onnx": False},
}


class Heard(Events):
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.skipped_stages: list[str] = []

    def stage(self, name: str, detail: str) -> None:
        self.stages.append(name)

    def skipped(self, name: str, detail: str) -> None:
        self.skipped_stages.append(name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    run(prepare(load_config(SMALL, [("export.onnx", "true")])), folder)
    return folder


def _copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_run_folder_holds_everything(finished: Path) -> None:
    for name in (
        "config.yaml", "provenance.json", "split.json", "log.jsonl", "metrics.json", "predictions.npz", "report.html",
        "student.onnx", "export.json", "teacher/model.safetensors", "teacher/diagnosis.json", "teacher/profile.pt",
        "student/model.safetensors", "baselines/kd/model.safetensors", "baselines/none/network.json",
    ):  # fmt: skip
        assert (finished / name).stat().st_size > 0, name
    assert not list((finished / "checkpoints").glob("*")) if (finished / "checkpoints").exists() else True
    assert not [p for p in finished.rglob(".*")], "temporary files were left behind"


def test_metrics_agree_with_the_predictions_they_come_from(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    stored = np.load(finished / "predictions.npz")
    split = json.loads((finished / "split.json").read_text())
    labels = stored["labels"]
    rows = {"teacher": metrics["teacher"], "student": metrics["student"], "baselines/kd": metrics["baselines"]["kd"]}
    for key, row in rows.items():
        right = stored[f"{key}.prediction"] == labels
        assert row["top1"] == pytest.approx(right.mean())
        per_class = np.array([right[labels == c].mean() for c in range(10)])
        assert row["balanced_accuracy"] == pytest.approx(per_class.mean())
        index = np.array(split["groups"]["index"])
        for g, name in enumerate(split["groups"]["names"]):
            assert row["groups"][name]["accuracy"] == pytest.approx(per_class[index == g].mean())
        assert (row["selection"], row["split"], row["epochs"]) == ("last", "test", 2)
    assert metrics["student"]["recipe"] == "krdistill" and metrics["student"]["model"] == "resnet8"
    assert set(metrics["baselines"]) == {"none", "kd"}


def test_stored_student_gives_the_stored_predictions(finished: Path) -> None:
    plan = prepare(load_config(SMALL, [("export.onnx", "true")]))
    network = load_network(finished / "student").eval()
    with torch.no_grad():
        said = network(plan.data.test.images.permute(0, 3, 1, 2)).logits.argmax(1)
    assert (said.numpy() == np.load(finished / "predictions.npz")["student.prediction"]).all()


def test_log_has_a_line_per_epoch_and_network(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        (stage, epoch) for stage in ("teacher", "baselines/none", "baselines/kd", "student") for epoch in (1, 2)
    ]
    last = lines[-1]
    assert set(last["loss"]) == {"classification", "lrd", "rrd", "total"}
    assert set(last["correction_rate"]) == {"head", "medium", "tail"}
    assert last["test"]["top1"] is not None
    assert "correction_rate" not in lines[0]


def test_a_finished_stage_is_not_done_again(finished: Path, tmp_path: Path) -> None:
    folder = _copy(finished, tmp_path / "again")
    (folder / "metrics.json").unlink()
    shutil.rmtree(folder / "baselines" / "kd")
    heard = Heard()
    plan = prepare(load_config(SMALL, [("export.onnx", "true")]))
    before = (folder / "student" / "model.safetensors").read_bytes()
    run(plan, folder, events=heard)
    assert heard.stages == ["bank", "baselines/kd", "evaluation", "report"]  # the bank was not kept
    assert heard.skipped_stages == ["teacher", "diagnosis", "baselines/none", "student", "export"]
    assert (folder / "student" / "model.safetensors").read_bytes() == before
    # The same seed gives the same numbers, stage by stage.
    new = json.loads((folder / "metrics.json").read_text())
    assert new == json.loads((finished / "metrics.json").read_text())


def test_a_killed_training_goes_on_and_ends_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krdistill.stages.CHECKPOINT_SECONDS", 0.0)

    class KilledError(Exception):
        pass

    class Killer(Heard):
        def progress(self, name: str, done: int, total: int) -> None:
            if name == "student" and done > total // 2 + 1:
                raise KilledError

    folder = _copy(finished, tmp_path / "killed")
    for name in ("metrics.json", "student.onnx", "export.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "student")
    plan = prepare(load_config(SMALL, [("export.onnx", "true")]))
    with pytest.raises(KilledError):
        run(plan, folder, events=Killer())
    assert (folder / "checkpoints" / "student.pt").is_file()
    left = estimate_seconds(plan, folder)
    assert list(left) == ["student"] and left["student"] > 0
    run(plan, folder)
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((finished / "metrics.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["stage"] == "student"] == [1, 2]


def test_the_estimate_fits_nothing_and_the_training_set_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A classifier of a thousand classes takes minutes to fit, and a pass over a large training set hours."""
    fitted, asked = [], []
    fit, collected = objective.refit_classifier, loop.collect
    monkeypatch.setattr(objective, "refit_classifier", lambda *a, **o: fitted.append(o["device"]) or fit(*a, **o))
    plan = prepare(load_config({**SMALL, "recipe": {"name": "krdistill"}}))
    expected = {"teacher", "bank", "classifier", "baselines/none", "baselines/kd", "student"}
    assert set(estimate_seconds(plan, tmp_path / "run")) == expected
    assert not fitted

    def counted(network: torch.nn.Module, data: Any, *rest: Any, **options: Any) -> Any:
        asked.append((network, data))
        return collected(network, data, *rest, **options)

    for module in (loop, teacher_stages):
        monkeypatch.setattr(module, "collect", counted)
    run(plan, tmp_path / "run")
    assert fitted == [plan.device], "once for a run, where the run works"
    assert sum(data is plan.data.train for _, data in asked) == 1


def test_a_folder_with_another_run_is_refused_and_untouched(finished: Path, tmp_path: Path) -> None:
    folder = _copy(finished, tmp_path / "taken")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(RunFolderError, match=r"(?s)already holds another run.*student\.train\.epochs: 2 -> 3"):
        run(prepare(load_config(SMALL, [("student.train.epochs", "3"), ("export.onnx", "true")])), folder)
    assert before == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years", encoding="utf-8")
    with pytest.raises(RunFolderError, match="no run folder"):
        RunFolder(tmp_path / "mine", load_config(SMALL))


def test_a_folder_begun_on_other_data_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = _copy(finished, tmp_path / "changed")
    split = json.loads((folder / "split.json").read_text())
    (folder / "split.json").write_text(json.dumps({**split, "checksum": "0" * 64}))
    with pytest.raises(RunFolderError, match="other data"):
        run(prepare(load_config(SMALL, [("export.onnx", "true")])), folder)


def test_teacher_of_an_earlier_run_is_taken(finished: Path, tmp_path: Path) -> None:
    config = load_config(
        {
            **SMALL,
            "teacher": {"run": str(finished)},
            "train": {},
            "student": {"model": "resnet8", "train": {"epochs": 1}},
        },
        [("baselines", "[]")],
    )
    heard = Heard()
    metrics = run(prepare(config), tmp_path / "second", events=heard)
    first = json.loads((finished / "metrics.json").read_text())
    assert metrics["teacher"]["per_class"] == first["teacher"]["per_class"]
    assert metrics["teacher"]["model"] == "resnet14"
    with pytest.raises(ModelError, match="no folder"):
        prepare(load_config(SMALL, [("teacher.run", str(tmp_path / "nowhere"))]))
    with pytest.raises(ModelError, match=r"takes images of 8x8 with 1 channel.*the data are 16x16"):
        prepare(load_config(SMALL, [("teacher.run", str(finished)), ("data.image_size", "16")]))


def test_a_teacher_of_other_classes_is_refused_before_training(finished: Path, tmp_path: Path) -> None:
    card = finished / "teacher" / "network.json"
    other = tmp_path / "other"
    shutil.copytree(finished / "teacher", other / "teacher")
    values = json.loads(card.read_text())
    values["class_names"][3] = "drei"
    (other / "teacher" / "network.json").write_text(json.dumps(values))
    with pytest.raises(ModelError, match="unknown to the teacher"):
        prepare(load_config(SMALL, [("teacher.run", str(other))]))


@pytest.mark.parametrize(
    ("override", "kind", "said"),
    [
        (("student.model", "resnet9x"), ModelError, "network"),
        (("recipe", "krdistil"), ConfigError, "Did you mean 'krdistill'"),
        (("recipe.tau", "automatic"), ConfigError, "tau"),
        (("student.train.augmentation", "crop-flop"), KrdistillError, "crop-flip"),
        (("data.source", "cifer100"), KrdistillError, "cifar100"),
        (("data.source", "no/such/folder"), DataError, "no/such/folder"),
        (("data.imbalance_factor", "1e6"), DataError, "imbalance"),
    ],
)
def test_mistakes_are_found_before_training(override: tuple[str, str], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        prepare(load_config(SMALL, [override]))
    assert said in str(caught.value)


def test_validation_part_chooses_the_best_epoch_by_name(tmp_path: Path) -> None:
    config = load_config({**SMALL, "baselines": []}, [("data.val_fraction", "0.2"), ("train.epochs", "1")])
    metrics = run(prepare(config), tmp_path / "val")
    assert metrics["student"]["best"]["chosen_on"] == "validation"
    lines = [json.loads(line) for line in (tmp_path / "val" / "log.jsonl").read_text().splitlines()]
    assert "val" in lines[-1] and "test" not in lines[-1]


def test_distiller_is_the_same_job_as_one_object(tmp_path: Path) -> None:
    train = {"epochs": 2, "augmentation": "crop-only", "evaluate_every": 2}
    distiller = Distiller(teacher="resnet14", student="resnet8", recipe="krdistill", train=train, groups="thirds")
    with pytest.raises(KrdistillError, match="fit"):
        distiller.predict(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    data = prepare(load_config(SMALL)).data
    scores = distiller.fit(data).evaluate()
    assert set(scores["groups"]) == {"head", "medium", "tail"}
    probabilities = distiller.predict(data.test.images[:7])
    assert probabilities.shape == (7, 10) and torch.allclose(probabilities.sum(1), torch.ones(7), atol=1e-5)
    with pytest.raises(ArgumentError, match="uint8 images"):
        distiller.predict(data.test.images[:7].float())
    again = load_network(distiller.save(tmp_path / "student")).eval()
    with torch.no_grad():
        assert torch.allclose(
            again(data.test.images[:7].permute(0, 3, 1, 2)).logits.softmax(1), probabilities, atol=1e-5
        )
    assert distiller.export(tmp_path / "student.onnx")["agreement"] == 1.0


def test_distiller_takes_modules_and_recipes_without_a_teacher() -> None:
    data = prepare(load_config(SMALL)).data
    train = {"epochs": 1, "augmentation": "none", "evaluate_every": 1}

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.ReLU())
            self.classify = torch.nn.Linear(24, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classify(self.layers(x))

    for recipe, teacher in (("kd", Own()), ("krdistill", Own()), ("none", None)):
        distiller = Distiller(teacher, Own(), recipe, train=train, groups="thirds").fit(data)
        assert distiller.evaluate()["images"] == len(data.test.labels)
    with pytest.raises(ArgumentError, match="needs a teacher"):
        Distiller(None, "resnet8", "kd")


def test_of_too_many_rows_the_largest_classes_lose_first() -> None:
    labels = torch.tensor([0] * 50 + [1] * 7 + [2] * 2)[torch.randperm(59, generator=torch.Generator().manual_seed(0))]
    kept = stages._some_of_each(labels, 20)
    assert torch.bincount(labels[kept]).tolist() == [11, 7, 2] and kept.unique().numel() == 20
    assert torch.equal(kept, kept.sort().values) and kept[-1] > 40  # from everywhere
    assert torch.bincount(labels[stages._some_of_each(labels, 2)]).tolist() == [1, 1, 1]
    assert torch.equal(stages._some_of_each(labels, 59), torch.arange(59))
