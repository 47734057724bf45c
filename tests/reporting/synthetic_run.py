"""A run folder with made-up but lifelike contents: every number comes from the project's own measuring functions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from krdistill.evaluation import diagnose_teacher, evaluate_predictions, prediction_record, predictions
from krdistill.files import write_json
from krdistill.priors import ClassPrior

MakeRun = Callable[..., Path]


def long_tail(K: int, factor: float, n_max: int = 500) -> list[int]:
    return [int(n_max * factor ** (-k / (K - 1))) for k in range(K)]


def build_run(
    folder: Path,
    *,
    K: int = 10,
    factor: float = 100,
    n_max: int = 500,
    per_class: int = 40,
    baselines: Sequence[str] = ("none", "kd"),
    names: Sequence[str] | None = None,
    groups: Any = "shot",
    epochs: int = 40,
    seed: int = 0,
) -> Path:
    """Writes the files a finished run leaves behind."""
    gen = torch.Generator().manual_seed(seed)
    prior = ClassPrior.from_counts(long_tail(K, factor, n_max), class_names=names or [f"class {k}" for k in range(K)])
    division = prior.groups(groups)
    labels = torch.arange(K).repeat_interleave(per_class)
    log_prior = prior.log_prior.float()

    def logits(labels: torch.Tensor, skill: float, lean: float, sharp: float = 1.0) -> torch.Tensor:
        """``skill`` lifts the truth, more where there were more images; ``lean`` is the bias to the head."""
        rarity = (log_prior - log_prior.min()) / (log_prior.max() - log_prior.min() + 1e-9)
        z = torch.randn(len(labels), K, generator=gen) + lean * (log_prior - log_prior.mean())
        z[torch.arange(len(labels)), labels] += skill * (0.6 + 0.6 * rarity[labels])
        return sharp * z

    plain = logits(labels, 3.4, 0.7, 1.8)
    rectified = plain - 1.0 * log_prior
    train_labels = torch.repeat_interleave(torch.arange(K), prior.counts)
    diagnosis = diagnose_teacher(
        plain, labels, prior, division, rectified_logits=rectified,
        train_predictions=predictions(logits(train_labels, 6.5, 0.5)), train_labels=train_labels,
    )  # fmt: skip
    arrays: dict[str, np.ndarray] = {"labels": labels.numpy().astype(np.int32)}

    def measure(key: str, z: torch.Tensor, **about: Any) -> dict[str, Any]:
        for name, values in prediction_record(z, labels).items():
            arrays[f"{key}.{name}"] = values
        scores = evaluate_predictions(z, labels, division, class_names=prior.class_names)
        best = {"epoch": epochs - 5, "top1": min(1.0, scores["top1"] + 0.004), "chosen_on": "test"}
        return {"split": "test", "selection": "last", "epochs": epochs, "best": best, **scores, **about}

    metrics: dict[str, Any] = {"teacher": measure("teacher", plain, model="resnet32x4", parameters=7_433_860)}
    metrics["teacher"]["recipe"] = "cross-entropy"
    metrics["teacher_rectified"] = measure(
        "teacher_rectified", rectified, model="resnet32x4", parameters=7_433_860, best=None,
        recipe="label prior removed, tau 1.00",
    )  # fmt: skip
    metrics["baselines"] = {
        key: measure(
            f"baselines/{key}",
            logits(labels, 2.6 + 0.2 * i, 0.6, 1.5),
            model="resnet8x4",
            parameters=1_233_540,
            recipe=key,
        )
        for i, key in enumerate(baselines)
    }
    metrics["student"] = measure(
        "student", logits(labels, 3.1, 0.1), model="resnet8x4", parameters=1_233_540, recipe="krdistill"
    )
    metrics["split_checksum"] = "9f1c"
    lines = []
    for stage, scores in [
        ("teacher", metrics["teacher"]),
        *((f"baselines/{k}", m) for k, m in metrics["baselines"].items()),
        ("student", metrics["student"]),
    ]:
        for epoch in range(1, epochs + 1):
            grown = 1 - float(np.exp(-5 * epoch / epochs))
            terms = {"classification": 0.4 + 2.2 * (1 - grown)}
            if stage == "student":
                terms |= {"lrd": 0.25 + 1.6 * (1 - grown), "rrd": 0.1 + 0.5 * (1 - grown)}
            elif stage == "baselines/kd":
                terms["kd"] = 0.3 + 1.9 * (1 - grown)
            line: dict[str, Any] = {
                "stage": stage, "epoch": epoch, "epochs": epochs, "lr": 0.05 * (1 - epoch / epochs), "seconds": 1.4,
                "loss": {**terms, "total": sum(terms.values())}, "train_accuracy": 0.95 * grown,
            }  # fmt: skip
            if epoch % 5 == 0 or epoch == epochs:
                line["test"] = {
                    "top1": scores["top1"] * grown,
                    "groups": {n: g["accuracy"] and g["accuracy"] * grown for n, g in scores["groups"].items()},
                }  # fmt: skip
            if stage == "student":
                rates = dict(zip(division.names, (0.02, 0.08, 0.31), strict=False))
                line["correction_rate"] = {n: rates[n] if s else None for n, s in division.sizes().items()}
            lines.append(json.dumps(line))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics)
    write_json(
        folder / "teacher" / "diagnosis.json",
        {
            **diagnosis,
            "rectified_by": {"prior": "label", "tau": 1.0, "words": "label prior removed, tau 1.00"},
            "views": "training images under trivial-augment",
        },
    )
    write_json(
        folder / "split.json",
        {
            "name": f"synthetic-{K}", "class_names": list(prior.class_names), "counts": prior.counts.tolist(),
            "test_counts": [per_class] * K, "imbalance_factor": prior.imbalance_factor, "profile": "exp",
            "checksum": "9f1c" * 16, "groups": division.as_dict(), "train_images": prior.total, "val_images": 0,
            "test_images": len(labels),
        },
    )  # fmt: skip
    write_json(
        folder / "provenance.json",
        {
            "krdistill": "0.1.0", "git": "0123456789ab", "python": "3.11.7", "torch": "2.13.0", "platform": "Linux-6.1",
            "processor": "a processor", "device": "cpu", "threads": 1, "started": "2025-01-02T03:04:05+00:00",
            "seconds": {"teacher": 61.2, "diagnosis": 3.0, "student": 118.9, "evaluation": 1.0}, "seed": 0,
            "split_checksum": "9f1c" * 16,
        },
    )  # fmt: skip
    config = {
        "name": folder.name,
        "seed": 0,
        "data": {"source": "digits", "root": None},
        "baselines": [{"name": b} for b in baselines],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "export.json", {"sentence": "student.onnx: 1.3 MB; agrees with PyTorch on every image."})
    np.savez_compressed(folder / "predictions.npz", **arrays)  # type: ignore[arg-type]
    return folder
