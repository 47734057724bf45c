"""Calibrates a network of a finished run: fitted on its validation part, judged on its test part."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bank import load_answers
from .calibration import METHODS, Calibrator, FeatureEvidence, fit_calibrator
from .calibration.temperature import HIGHEST, LOWEST
from .config import RunConfig, load_config
from .data import DataBundle
from .errors import ArgumentError, ConfigError, DataError, ModelError, RunFolderError, unknown_name
from .evaluation import evaluate_calibration
from .files import read_json, replacing, sha256, write_json
from .kinds import NOUNS
from .models.network import load_network
from .models.registry import parse_model
from .models.teacher import Teacher
from .outputs import Outputs
from .priors import ClassGroups
from .runfolder import CONFIG, DONE, SPLIT, owned
from .stages import load_configured_data, measure
from .training.loop import collect_outputs
from .training.task import best_device

CALIBRATION = "calibration.json"
_NEEDS_FEATURES = "head-to-tail"


@dataclass(frozen=True, eq=False)
class Judged:
    """What a network says of the parts that calibration needs.

    Attributes:
        key: ``student``, ``teacher`` or a baseline's.
        groups: of the classes.
        val, test: its answers to the validation and the test part.
        val_labels, test_labels: their classes.
        train: its answers to the training part, where they were asked for.
        train_labels: their classes.
        weights: SHA-256 of the file that it comes from.
        noun: what a row is, in the plural.
    """

    key: str
    groups: ClassGroups
    val: Outputs
    test: Outputs
    val_labels: Tensor
    test_labels: Tensor
    train: Outputs | None
    train_labels: Tensor
    weights: str
    noun: str


def calibrate_run(
    run: Path, methods: Sequence[str], *, network: str = "student", on_step: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Calibrates a network of a finished run by one method or several, and writes ``calibration.json`` and a figure.

    One method alone becomes the network's own: ``krdistill export`` puts it into the student's file. What was
    calibrated before stays beside it.

    Args:
        run: the run folder.
        methods: of :data:`~krdistill.calibration.METHODS`.
        network: ``student``, ``teacher`` or a baseline's key.
        on_step: hears what is done, in words.

    Returns:
        The network's part of ``calibration.json``: ``weights``, ``noun`` (what a row is), ``method`` (its own, or
        None), ``before`` (:func:`~krdistill.evaluation.evaluate_calibration` of its softmax), ``methods`` name to
        ``{"calibrator", "after", "seconds"}``, ``notes`` in words.

    Raises:
        ConfigError: the run has no validation part (``data.val_fraction``), or a method is unknown.
        RunFolderError: no finished run, no such network in it, or its data changed since.
        ModelError: head-to-tail calibration of answers without features.
    """
    check_methods(methods)
    say = on_step or (lambda words: None)
    config = _config_of(run)
    say("reading the data")
    judged = ask(run, network, features=_NEEDS_FEATURES in methods, on_step=say)
    found = calibrate(judged, methods, on_step=say)
    with owned(run, config):
        path = run / CALIBRATION
        checksum = read_json(run / SPLIT)["checksum"]
        known = _known(path)
        if known.get("split_checksum") != checksum:
            known = {}
        known = {
            "split_checksum": checksum,
            "fitted_on": {"part": "validation", judged.noun: len(judged.val_labels)},
            "judged_on": {"part": "test", judged.noun: len(judged.test_labels)},
            "networks": known.get("networks", {}),
        }
        old = known["networks"].get(network, {})
        if old.get("weights") == judged.weights:
            merged = {**old["methods"], **found["methods"]}
            found["methods"] = {name: merged[name] for name in METHODS if name in merged}
        else:
            old = {}
        found["method"] = methods[0] if len(methods) == 1 else old.get("method")
        known["networks"][network] = found
        say("drawing")
        from .reporting.calibration import draw  # matplotlib is not needed before

        with replacing(run / figure_name(network)) as part:
            draw(found, part, title=network)
        write_json(path, known)
    return found


def check_methods(methods: Sequence[str]) -> None:
    """Refuses unknown names before anything is read."""
    for name in methods:
        if name not in METHODS:
            raise ConfigError(unknown_name("calibration method", name, METHODS))
    if not methods:
        raise ConfigError(f"Expected at least one calibration method: {', '.join(METHODS)}.")


def figure_name(network: str) -> str:
    """The file of a network's reliability plots in the run folder."""
    return f"calibration-{network}.png"


def calibrate(
    judged: Judged, methods: Sequence[str], *, on_step: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Fits and judges; see :func:`calibrate_run`."""
    evidence = None
    if judged.train is not None:
        evidence = FeatureEvidence(judged.val.feature, judged.train.feature, judged.train_labels)
    K = judged.test.logits.shape[1]

    def judge(calibrator: Calibrator) -> dict[str, Any]:
        return evaluate_calibration(calibrator(judged.test.logits), judged.test_labels, judged.groups)

    made = {}
    for name in methods:
        if on_step is not None:
            on_step(name)
        started = time.perf_counter()
        calibrator = fit_calibrator(name, judged.val.logits, judged.val_labels, evidence=evidence)
        seconds = round(time.perf_counter() - started, 3)
        made[name] = {"calibrator": calibrator.as_dict(), "after": judge(calibrator), "seconds": seconds}
    return {
        "weights": judged.weights,
        "noun": judged.noun,
        "method": None,
        "before": judge(Calibrator("none", K, {})),
        "methods": made,
        "notes": _notes(judged, made),
    }


def ask(run: Path, network: str, *, features: bool, on_step: Callable[[str], None] | None = None) -> Judged:
    """Asks a network of a finished run about its validation and test part, and where features matter its training part.

    Args:
        run: the run folder.
        network: ``student``, ``teacher`` or a baseline's key.
        features: whether they will be needed.
        on_step: hears what is done, in words.

    Raises:
        As :func:`calibrate_run`.
    """
    say = on_step or (lambda words: None)
    config = _config_of(run)
    stage = network if network in ("student", "teacher") else f"baselines/{network}"
    stored = network == "teacher" and config.teacher.answers
    if not stored and not (run / stage / DONE).is_file():
        names = [p.parent.name for p in (run / "baselines").glob(f"*/{DONE}")]
        there = [n for n in ("student", "teacher") if (run / n / DONE).is_file()] + sorted(names)
        if not there:
            raise RunFolderError(f"No trained network in {run}. Expected the folder of a finished run.")
        raise RunFolderError(
            unknown_name("network", network, there, hint=f"Those that are trained in {run}: {', '.join(there)}.")
        )
    data = load_configured_data(config.data)
    if data.split["checksum"] != read_json(run / SPLIT)["checksum"]:
        raise RunFolderError(
            f"The data of {run} changed since it was run (another split checksum). Restore them, or run it again."
        )
    if data.val is None or not len(data.val):
        raise ConfigError(
            f"{run} has no validation part, and a calibrator is never fitted on images of training or test. Run it "
            "again with one put aside: --data.val_fraction 0.1 (and another --out)."
        )
    _, groups = measure(data, config.data.groups)
    say(f"asking the {network}")
    val, test, train, weights = (
        _stored(config, data) if stored else _trained(run / stage, config, data, features=features)
    )
    if features and not val.feature.shape[1]:
        raise ModelError(
            f"The answers of the {network} hold no features, and {_NEEDS_FEATURES} calibration needs them. Store them "
            "too, or take a method that needs logits alone, such as temperature."
        )
    return Judged(
        network, groups, val, test, data.val.labels, data.test.labels, train if features else None, data.train.labels,
        weights, NOUNS[data.test.kind],
    )  # fmt: skip


def student_calibrator(run: Path) -> Calibrator | None:
    """The calibrator that a run's student has been given, or None.

    Raises:
        RunFolderError: it was fitted to other weights, or its file is damaged.
    """
    entry = _known(run / CALIBRATION).get("networks", {}).get("student")
    if entry is None or entry["method"] is None:
        return None
    if entry["weights"] != sha256(run / "student" / _WEIGHTS):
        raise RunFolderError(
            f"{run / CALIBRATION} was fitted to other weights than the student has now. Give krdistill calibrate again."
        )
    try:
        return Calibrator.from_dict(entry["methods"][entry["method"]]["calibrator"])
    except (ArgumentError, KeyError, TypeError) as error:
        raise RunFolderError(f"{run / CALIBRATION} is damaged ({error!r}). Delete it and calibrate again.") from None


_WEIGHTS = "model.safetensors"


def _config_of(run: Path) -> RunConfig:
    if not (run / CONFIG).is_file() or not (run / SPLIT).is_file():
        raise RunFolderError(f"{run} is no run folder. Expected the folder of a finished run.")
    return load_config(str(run / CONFIG))


def _known(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
        for entry in found["networks"].values():
            if not {"weights", "noun", "method", "before", "methods", "notes"} <= set(entry):
                raise ValueError("a network's entry lacks a part")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}). Delete it and calibrate again.") from None
    return dict(found)


def _trained(
    folder: Path, config: RunConfig, data: DataBundle, *, features: bool
) -> tuple[Outputs, Outputs, Outputs | None, str]:
    named = [parse_model(part.model).name for part in (config.teacher, config.student)]
    network = Teacher(load_network(folder, allow_factories=named), class_names=data.train.class_names)
    device = best_device(config.device)

    def answers(part: Any) -> Outputs:
        logits, feature = collect_outputs(network, part, device=device)
        return Outputs(logits, feature if network.network.has_feature else feature.new_zeros(len(feature), 0))

    train = answers(data.train) if features else None
    return answers(data.val), answers(data.test), train, sha256(folder / _WEIGHTS)


def _stored(config: RunConfig, data: DataBundle) -> tuple[Outputs, Outputs, Outputs, str]:
    path = Path(str(config.teacher.answers))
    found = load_answers(path, data)
    if found.val is None or found.test is None:
        lost = "validation" if found.val is None else "test"
        raise DataError(f"{path} holds no answers to the {lost} images, so the teacher cannot be calibrated.")
    return found.val, found.test, found.train, sha256(path)


def _notes(judged: Judged, made: dict[str, Any]) -> list[str]:
    notes = []
    K = judged.test.logits.shape[1]
    seen = int((torch.bincount(judged.val_labels, minlength=K) > 0).sum())
    if seen < K:
        notes.append(
            f"{K - seen} of {K} classes have no validation {judged.noun}; what is fitted class by class leaves them to "
            "the network's own softmax or to temperature scaling."
        )
    for name, entry in made.items():
        T = entry["calibrator"]["parameters"].get("temperature")
        if T is not None and not LOWEST * 1.001 < T < HIGHEST * 0.999:
            end = "wrong and sure" if T > 1 else "right on every validation row"
            notes.append(
                f"{name}: the temperature is at the end of its range, {T:g}; the network is nearly always {end}."
            )
    return notes
