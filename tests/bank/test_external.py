"""Answers from elsewhere: found by id, in any order, by class name; what does not fit is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from krdistill.bank import load_answers
from krdistill.config import load_config
from krdistill.data import DataBundle, load_data
from krdistill.distiller import Distiller
from krdistill.errors import ConfigError, DataError, ModelError
from krdistill.pipeline import estimate_seconds, prepare, run

CPU = torch.device("cpu")
DATA = load_data("digits", profile="exp", imbalance_factor=10, val_fraction=0.2, seed=0)


def _write(path: Path, arrays: dict[str, Any]) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **{k: np.array(v) for k, v in arrays.items()})
    else:
        texts = {k: json.dumps(arrays[k]) for k in ("ids", "class_names") if k in arrays}
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items() if k not in texts}, path, metadata=texts)
    return path


def _answers(parts: str = "train val test", seed: int = 0) -> dict[str, Any]:
    """A file's content, rows shuffled over the parts: right answers with some noise."""
    rng = np.random.default_rng(seed)
    chosen = [getattr(DATA, p) for p in parts.split()]
    ids = [i for part in chosen for i in part.ids]
    labels = np.concatenate([part.labels.numpy() for part in chosen])
    order = rng.permutation(len(ids))
    logits = (4 * np.eye(10)[labels] + rng.normal(size=(len(ids), 10))).astype(np.float32)
    return {
        "ids": [ids[i] for i in order],
        "logits": logits[order],
        "features": rng.normal(size=(len(ids), 6)).astype(np.float32),
    }


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_rows_and_columns_are_found_by_name(suffix: str, tmp_path: Path) -> None:
    arrays = _answers()
    shuffled = np.random.default_rng(1).permutation(10)
    names = [DATA.class_names[k] for k in shuffled]
    path = _write(tmp_path / f"a{suffix}", {**arrays, "logits": arrays["logits"][:, shuffled], "class_names": names})
    found = load_answers(path, DATA)
    place = {name: i for i, name in enumerate(arrays["ids"])}
    for part, answers in (("train", found.train), ("val", found.val), ("test", found.test)):
        rows = [place[i] for i in getattr(DATA, part).ids]
        assert answers is not None
        assert np.array_equal(answers.logits.numpy(), arrays["logits"][rows])
        assert np.array_equal(answers.feature.numpy(), arrays["features"][rows])
    index = torch.tensor([4, 0, 4])
    read = found.read(7, index, CPU)
    assert torch.equal(read.logits, found.train.logits[index]) and found.feature_dim == 6
    assert found.replay(7) is None


def test_probabilities_are_read_as_their_logarithm(tmp_path: Path) -> None:
    arrays = _answers("train")
    p = torch.from_numpy(arrays.pop("logits")).softmax(1).numpy()
    p[0] = np.eye(10)[3]
    arrays.pop("features")
    found = load_answers(_write(tmp_path / "p.npz", {**arrays, "probabilities": p}), DATA)
    rows = [arrays["ids"].index(i) for i in DATA.train.ids]
    assert torch.allclose(found.train.logits.softmax(1), torch.from_numpy(p[rows]), atol=1e-5)
    assert found.feature_dim == 0 and found.val is None and found.test is None


def _without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda a: {k: v for k, v in a.items() if k not in names}


def _drop(n: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda a: {k: v[n:] for k, v in a.items()}


def _set(**changes: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda a: {**a, **{k: f(a) for k, f in changes.items()}}


def _spoil(a: dict[str, Any]) -> Any:
    logits = a["logits"].copy()
    logits[7, 2] = np.nan
    return logits


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("logits"), "expected 'logits' or 'probabilities'"),
        (_without("ids"), "expected 'ids'"),
        (_drop(1), "no answers to 1 of the"),
        (_set(ids=lambda a: [*a["ids"][:-1], a["ids"][0]]), "stand there twice"),
        (_set(ids=lambda a: [*a["ids"], "train/99999"], logits=lambda a: np.vstack([a["logits"], a["logits"][:1]]),
              features=lambda a: np.vstack([a["features"], a["features"][:1]])), "1 of .* ids are no images of digits"),
        (_set(logits=lambda a: a["logits"][:, :9]), "9 columns; the data have 10 classes"),
        (_set(logits=lambda a: a["logits"].astype(np.int64)), "to be floating point"),
        (_set(logits=lambda a: a["logits"][:-1]), "one row per id"),
        (_set(logits=_spoil), "1 rows of logits hold numbers that are not finite"),
        (_set(class_names=lambda a: list("abcdefghij")), "unknown to the teacher"),
        (_set(ids=lambda a: list(range(len(a["ids"])))), "expected 'ids', a list of texts"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: Any, message: str, suffix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_answers(_write(tmp_path / f"a{suffix}", change(_answers())), DATA)


def test_probabilities_that_are_none(tmp_path: Path) -> None:
    arrays = _answers()
    with pytest.raises(DataError, match="sum to 1 in every row"):
        load_answers(_write(tmp_path / "a.npz", {"ids": arrays["ids"], "probabilities": arrays["logits"]}), DATA)


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_files_that_are_none_are_refused_and_nothing_is_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "evil.npz", ids=np.array([_Evil()], dtype=object))
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(_Evil()))
    (tmp_path / "short.safetensors").write_bytes(b"\xff" * 4)
    (tmp_path / "huge.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    (tmp_path / "text.csv").write_text("a,b")
    for name in ("evil.npz", "pickle.npz", "short.safetensors", "huge.safetensors", "text.csv", "gone.npz"):
        with pytest.raises(DataError, match=name):
            load_answers(tmp_path / name, DATA)
    assert not (tmp_path / "executed").exists()


RUN: dict[str, Any] = {
    "name": "blackbox",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 10, "val_fraction": 0.2, "groups": "thirds"},
    "student": {"model": "resnet8w8"},
    "train": {"epochs": 6, "batch_size": 64, "augmentation": "crop-only"},
    "recipe": {"name": "krdistill", "prior": "label"},  # the features in the file say nothing
    "baselines": ["none", "kd"],
    "export": {"onnx": False},
}


def _bundle() -> DataBundle:
    return prepare(load_config(RUN)).data


@pytest.mark.parametrize("parts", ["train val test", "train"])
def test_the_whole_job_with_a_teacher_that_is_a_file(parts: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "teacher.safetensors", _answers(parts))
    plan = prepare(load_config(RUN, [("teacher.answers", str(path))]))
    folder = tmp_path / "run"
    assert set(estimate_seconds(plan, folder)) == {"baselines/none", "baselines/kd", "student"}
    metrics = run(plan, folder)
    assert ("teacher" in metrics) == ("test" in parts)
    assert (folder / "report.html").stat().st_size > 1000
    assert not (folder / "teacher" / "model.safetensors").exists()
    assert metrics["student"]["balanced_accuracy"] > metrics["baselines"]["none"]["balanced_accuracy"]
    if "test" in parts:
        assert metrics["teacher"]["parameters"] is None and metrics["teacher"]["top1"] > 0.8


def test_recipes_that_look_into_the_teacher_are_refused(tmp_path: Path) -> None:
    arrays = _answers()
    arrays.pop("features")
    path = _write(tmp_path / "a.npz", arrays)
    plan = prepare(load_config({**RUN, "baselines": []}, [("teacher.answers", str(path))]))
    with pytest.raises(ModelError, match="needs the teacher's features, which are not among the stored answers"):
        run(plan, tmp_path / "run")
    with pytest.raises(ConfigError, match="say where the teacher comes from"):
        load_config(RUN, [("teacher.answers", str(path)), ("teacher.run", "runs/other")])
    with pytest.raises(ConfigError, match=r"bank\.views: teacher\.answers are stored answers already"):
        prepare(load_config(RUN, [("teacher.answers", str(path)), ("bank.views", "4")]))


def test_the_distiller_takes_a_file_too(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.npz", _answers())
    distiller = Distiller(
        path, "resnet8w8", "kd-balanced", train={"epochs": 1, "augmentation": "none"}, groups="thirds"
    )
    distiller.fit(_bundle())
    assert distiller.teacher_ is None and 0 < distiller.evaluate()["top1"] <= 1


def test_the_distiller_keeps_a_bank_where_it_is_told_to(tmp_path: Path) -> None:
    bundle = _bundle()
    shared: dict[str, Any] = {"train": {"epochs": 2, "augmentation": "crop-only"}, "groups": "thirds"}
    plain = Distiller("resnet8w8", "resnet8w8", "kd", **shared).fit(bundle)
    assert plain.teacher_ is not None
    from_bank = Distiller(plain.teacher_.network, "resnet8w8", "kd", bank=tmp_path / "bank", **shared).fit(bundle)
    assert len([p for p in (tmp_path / "bank").iterdir() if p.is_dir()]) == 1
    assert from_bank.evaluate()["nll"] == pytest.approx(plain.evaluate()["nll"], rel=0.02)
