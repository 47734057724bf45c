"""Stores what a network of a finished run answers, with another head on its frozen features where asked for.

The file is what ``teacher.answers`` takes, so any head can teach: :func:`krdistill.bank.load_answers` reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import METHODS, Calibrator, FeatureEvidence, fit_calibrator
from .config import RunConfig, load_config
from .data import DataBundle
from .errors import ConfigError, ModelError, RunFolderError, unknown_name
from .evaluation import evaluate_predictions
from .files import read_json, replacing
from .models.network import load_network
from .models.registry import parse_model
from .models.teacher import Teacher
from .rectify.second_stage import apply_second_stage
from .runfolder import CONFIG, DONE, SPLIT
from .stages import load_configured_data, measure
from .training.loop import collect_outputs
from .training.task import best_device

HEADS = ("own", "balanced-softmax", "crt", "tau-norm", "lws", "ncm", "dlsa")
CHOOSING = ("tau-norm", "dlsa")  # they choose something on held-out rows
WEIGHT_DECAYS = (1e-3, 1e-4, 1e-5)

Answer = Callable[[Tensor], Tensor]


def fit_head(
    name: str,
    own: nn.Linear | None,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> tuple[Answer, dict[str, Any]]:
    """A head on frozen features.

    Args:
        name: of :data:`HEADS`: ``own`` is the network's as it is, ``balanced-softmax``
            :func:`~krdistill.rectify.classifier_refit.refit_classifier`, ``dlsa`` :func:`~krdistill.dlsa.fit_dlsa`; the
            others are :func:`~krdistill.rectify.apply_second_stage`'s.
        own: the network's last layer, not changed; ``balanced-softmax``, ``crt``, ``ncm`` and ``dlsa`` can do without.
        features: of the training rows, shape ``(N, D)``.
        labels: shape ``(N,)``.
        num_classes: K.
        held_out: features and labels of rows that were not trained on; the heads of :data:`CHOOSING` need them.
        seed: of what is drawn.
        options: of the head's own function.

    Returns:
        What gives logits of features, and what was chosen, for the record.

    Raises:
        ConfigError: an unknown name, or nothing to choose on.
        ModelError: no linear layer where one is needed.
        ArgumentError, DataError, MissingDependencyError: as the head's own function.
    """
    if name not in HEADS:
        raise ConfigError(unknown_name("head", name, HEADS))
    if name in CHOOSING and held_out is None:
        raise ConfigError(
            f"The head {name!r} chooses on held-out examples, and never on training or test ones. Give a run with a "
            "validation part: --data.val_fraction 0.1 (and another --out)."
        )
    if name == "dlsa":
        from .dlsa import fit_dlsa

        head, found = fit_dlsa(features, labels, num_classes, held_out=held_out, seed=seed, **{"depth": 2, **options})
        return head, {"head": name, **found}
    layer = nn.Linear(features.shape[1], num_classes)
    if name not in ("balanced-softmax", "crt", "ncm"):
        if type(own) is not nn.Linear:
            raise ModelError(f"The head {name!r} starts from a plain linear layer, got {type(own).__name__}.")
        layer = nn.Linear(own.in_features, own.out_features, bias=own.bias is not None)
        layer.load_state_dict(own.state_dict())
    layer.requires_grad_(False)
    if name == "own":
        return layer, {"head": name}
    if name == "tau-norm":
        options = {"held_out": held_out, **options}
    elif name in ("crt", "lws"):
        options = {"seed": seed, **options}
    return layer, {"head": name, **apply_second_stage(layer, name, features, labels, **options)}  # type: ignore[arg-type]


def answer_run(
    run: Path,
    *,
    head: str = "own",
    network: str = "teacher",
    calibrated: str | None = None,
    out: Path | None = None,
    seed: int | None = None,
    on_step: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[Path, dict[str, Any]]:
    """Asks a network of a finished run about all its examples, as they are, and stores logits and features.

    Args:
        run: the run folder.
        head: what answers on its features; see :func:`fit_head`. It is fitted to the training part.
        network: ``teacher``, ``student`` or a baseline's key.
        calibrated: a calibration method (:data:`krdistill.calibration.METHODS`), fitted to these answers on the
            validation part; the logarithms of its probabilities are stored as logits.
        out: the ``.npz`` file to write; by default ``answers-<network>-<head>.npz`` in the run folder, with
            ``-<calibrated>`` where there is one.
        seed: of the head; by default the run's.
        on_step: hears what is done, in words.
        options: of the head's own function.

    Returns:
        The file, and ``{"head", ..., "test"}``: what was chosen, the calibrator as plain data, and the metrics on the
        test part (:func:`~krdistill.evaluation.evaluate_predictions`).

    Raises:
        ConfigError: an unknown head or method, another ending than ``.npz``, or one that needs a validation part.
        RunFolderError: no finished run, no such network in it, or its data changed since.
        ModelError: a network without features, where the head needs them.
    """
    say = on_step or (lambda words: None)
    if head not in HEADS:
        raise ConfigError(unknown_name("head", head, HEADS))
    if calibrated is not None and calibrated not in METHODS:
        raise ConfigError(unknown_name("calibration method", calibrated, METHODS))
    out = out or run / f"answers-{network}-{head}{'' if calibrated is None else f'-{calibrated}'}.npz"
    if out.suffix != ".npz":
        raise ConfigError(f"{out}: expected a .npz file to write the answers to.")
    if not (run / CONFIG).is_file() or not (run / SPLIT).is_file():
        raise RunFolderError(f"{run} is no run folder. Expected the folder of a finished run.")
    config = load_config(str(run / CONFIG))
    folder = run / network if network in ("teacher", "student") else run / "baselines" / network
    if not (folder / DONE).is_file():
        there = [p.parent.name for p in (*run.glob(f"*/{DONE}"), *run.glob(f"baselines/*/{DONE}"))]
        if not there:
            raise RunFolderError(f"No trained network in {run}. Expected the folder of a finished run.")
        raise RunFolderError(unknown_name("network", network, there, hint=f"Trained in {run}: {', '.join(there)}."))
    say("reading the data")
    data = load_configured_data(config.data)
    if data.split["checksum"] != read_json(run / SPLIT)["checksum"]:
        raise RunFolderError(
            f"The data of {run} changed since it was run (another split checksum). Restore them, or run it again."
        )
    say(f"asking the {network}")
    named = (("train", data.train), ("val", data.val), ("test", data.test))
    parts = {name: part for name, part in named if part is not None and len(part)}
    if calibrated is not None and "val" not in parts:
        raise ConfigError(
            f"{run} has no validation part, and a calibrator is never fitted on training or test examples. Run it "
            "again with one put aside: --data.val_fraction 0.1 (and another --out)."
        )
    outputs, own, has_feature = _ask(folder, config, data, parts)
    if head != "own":
        if not has_feature:
            raise ModelError(f"The {network} gives no features, and the head {head!r} is fitted on them.")
        say(f"fitting the head {head}")
        held_out = (outputs["val"][1], parts["val"].labels) if "val" in parts else None
        K = data.train.num_classes
        answer, found = fit_head(
            head, own, outputs["train"][1], data.train.labels, K, held_out=held_out,
            seed=config.seed if seed is None else seed, **options,
        )  # fmt: skip
        with torch.no_grad():
            outputs = {p: (answer(f).float(), f) for p, (_, f) in outputs.items()}
    else:
        found = {"head": head}
    if calibrated is not None:
        say(f"calibrating by {calibrated}")
        calibrator = _calibrator(calibrated, outputs, parts, has_feature, network)
        outputs = {p: (calibrator.log_probabilities(z).float(), f) for p, (z, f) in outputs.items()}
        found = {**found, "calibrator": calibrator.as_dict()}
    arrays: dict[str, Any] = {
        "logits": torch.cat([z for z, _ in outputs.values()]).numpy(),
        "ids": np.array([i for p in parts.values() for i in p.ids]),
        "class_names": np.array(data.train.class_names),
    }
    if has_feature:
        arrays["features"] = torch.cat([f for _, f in outputs.values()]).numpy()
    with replacing(out) as part, part.open("wb") as file:
        np.savez(file, **arrays)
    _, groups = measure(data, config.data.groups)
    test = evaluate_predictions(outputs["test"][0], data.test.labels, groups, class_names=data.test.class_names)
    return out, {**found, "test": test}


def _calibrator(
    method: str, outputs: dict[str, tuple[Tensor, Tensor]], parts: dict[str, Any], has_feature: bool, network: str
) -> Calibrator:
    evidence = None
    if method == "head-to-tail":
        if not has_feature:
            raise ModelError(f"The {network} gives no features, and head-to-tail calibration needs them.")
        evidence = FeatureEvidence(outputs["val"][1], outputs["train"][1], parts["train"].labels)
    return fit_calibrator(method, outputs["val"][0], parts["val"].labels, evidence=evidence)


def _ask(
    folder: Path, config: RunConfig, data: DataBundle, parts: dict[str, Any]
) -> tuple[dict[str, tuple[Tensor, Tensor]], nn.Linear | None, bool]:
    """Every part's logits, in the data's order of classes, and features; the last layer; whether there are features."""
    named = [parse_model(part.model).name for part in (config.teacher, config.student)]
    asked = Teacher(load_network(folder, allow_factories=named), class_names=data.train.class_names)
    device = best_device(config.device)
    found = {name: collect_outputs(asked, part, device=device) for name, part in parts.items()}
    network = asked.network.cpu()
    own = None if network.answers else network.backbone.get_submodule(network.head_name)
    if isinstance(own, nn.Linear) and not asked.identity and type(own) is nn.Linear:
        order, source = asked.order.cpu(), own
        own = nn.Linear(source.in_features, source.out_features, bias=source.bias is not None)
        own.load_state_dict({k: v[order] for k, v in source.state_dict().items()})
    return found, own if type(own) is nn.Linear else None, network.has_feature
