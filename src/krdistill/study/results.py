"""What a study came to: one record per finished item, and from them means, differences and what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import __version__, runfolder
from ..config import parse_yaml, read_text
from ..files import read_json
from ..priors import ClassPrior
from .plan import StudyPlan
from .statistics import CONFIDENCE, mean_interval, paired_difference, summarise
from .store import StudyFolder

SCALARS = ("top1", "top5", "balanced_accuracy", "harmonic_mean", "ece", "nll")
RULES = ("shot", "thirds")
_PROVENANCE = (
    "krdistill", "git", "python", "torch", "platform", "processor", "device", "threads", "seed", "split_checksum",
    "started",
)  # fmt: skip


# One item -------------------------------------------------------------------------------------------------------------


def item_result(run: Path, key: str, kind: str) -> dict[str, Any]:
    """The record of a finished item, from the files of its run folder.

    Returns:
        ``key``, ``kind``, ``config_hash``, ``provenance``, ``seconds`` (and those of each stage), ``split``, and
        ``networks``: of a cell the ``student``, of a teacher itself and with its prior removed. A network's ``last``
        and ``best`` hold the metrics of the last and of the best epoch; ``groups`` is by the run's rule and by the
        field's usual ones, rule to group to accuracy.
    """
    metrics, provenance = read_json(run / runfolder.METRICS), read_json(run / runfolder.PROVENANCE)
    split = read_json(run / runfolder.SPLIT)
    config = parse_yaml(read_text(run / runfolder.CONFIG), str(run / runfolder.CONFIG))
    log = [line for line in _lines(run) if line.get("stage") == ("student" if kind == "cell" else "teacher")]
    names = ("student",) if kind == "cell" else ("teacher", "teacher_rectified")
    seconds = provenance.get("seconds", {})
    return {
        "key": key,
        "kind": kind,
        "config_hash": key.rsplit("-", 1)[1],
        "provenance": {name: provenance.get(name) for name in _PROVENANCE},
        "seconds": round(sum(seconds.values()), 2),
        "stage_seconds": seconds,
        "split": {
            "name": split["name"],
            "kind": split.get("kind", "image"),
            "classes": len(split["class_names"]),
            "largest_class": max(split["counts"]),
            "smallest_class": min(split["counts"]),
            "rule": split["groups"]["rule"],
            "train_images": split["train_images"],
            "val_images": split["val_images"],
            "test_images": split["test_images"],
        },
        "networks": {name: _network(metrics[name], split, config["data"]["groups"], log) for name in names},
    }


def _network(
    row: Mapping[str, Any], split: Mapping[str, Any], rule: Any, log: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    own = {name: group["accuracy"] for name, group in row["groups"].items()}
    asked = rule if isinstance(rule, str) else "own"
    last = {
        "epoch": row.get("epochs"),
        **{name: row.get(name) for name in SCALARS},
        "worst_class": row["worst_class"]["accuracy"],
        "groups": {asked: own, **{r: _by_rule(row["per_class"], split, r) for r in RULES if r != asked}},
    }
    best = row.get("best")
    if best is not None:
        line: Mapping[str, Any] = next((entry for entry in log if entry.get("epoch") == best["epoch"]), {})
        judged = line.get("val") or line.get("test") or {}
        best = {**best, "groups": {asked: judged.get("groups", {})}}
    about = {name: row.get(name) for name in ("model", "recipe", "parameters", "macs")}
    return {**about, "last": last, "best": best}


def _by_rule(per_class: Sequence[float | None], split: Mapping[str, Any], rule: str) -> dict[str, float | None]:
    prior = ClassPrior.from_counts(split["counts"], class_names=split["class_names"])
    values = torch.tensor([math.nan if a is None else a for a in per_class], dtype=torch.float64)
    return prior.groups(rule).mean_over(values)


def _lines(run: Path) -> list[dict[str, Any]]:
    path = run / runfolder.LOG
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


# The whole study ------------------------------------------------------------------------------------------------------


def collect(plan: StudyPlan, folder: StudyFolder) -> dict[str, Any]:
    """Everything that a study came to so far, as plain data.

    Returns:
        ``name``, ``krdistill``, ``baseline``, ``confidence``, ``seeds``, ``study`` (the file), ``cells`` (labels,
        folder, ``state`` done, failed or missing, ``result``), ``teachers`` (results by key) and ``places``: for each
        data set, pair and teacher the ``rows`` of :func:`summary_rows`, ``teachers`` likewise, and ``notes``.
    """
    study = plan.study
    seeds = list(study.seeds)
    cells: list[dict[str, Any]] = []
    teachers: dict[str, dict[str, Any] | None] = {}
    for cell in plan.cells:
        result, failure = folder.result(cell.item), folder.failure(cell.item) or folder.failure(cell.teacher_item)
        teachers[cell.teacher_item] = folder.result(cell.teacher_item)
        cells.append(
            {
                "data": cell.data, "pair": cell.pair, "teacher": cell.teacher, "method": cell.method,
                "seed": cell.seed, "folder": cell.item, "teacher_folder": cell.teacher_item,
                "state": "done" if result else "failed" if failure else "missing",
                "message": failure["message"] if failure and not result else None, "result": result,
            }
        )  # fmt: skip
    places, devices = [], folder.devices()
    for place in plan.places:
        here = [c for c in cells if (c["data"], c["pair"], c["teacher"]) == place]
        places.append(
            {
                "data": place[0], "pair": place[1], "teacher": place[2],
                "split": next((c["result"]["split"] for c in here if c["result"]), None),
                "rows": summary_rows(here, [m.key for m in study.methods], study.reference, seeds),
                "teachers": teacher_rows(here, teachers, [m.key for m in study.methods]),
                "notes": _notes(here),
                "device": devices.get("/".join(v or "-" for v in place)),
            }
        )  # fmt: skip
    return {
        "name": study.name,
        "krdistill": __version__,
        "baseline": study.reference,
        "confidence": CONFIDENCE,
        "seeds": seeds,
        "study": study.model_dump(mode="json"),
        "places": places,
        "cells": cells,
        "teachers": {key: result for key, result in teachers.items() if result is not None},
    }


def summary_rows(
    cells: Sequence[Mapping[str, Any]], methods: Sequence[str], baseline: str, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One row per method: each metric's mean and spread over the seeds, and its paired difference to the baseline.

    Args:
        cells: of one place: ``method``, ``seed``, ``state`` and ``result``.
        methods: labels, in order.
        baseline: one of them.
        seeds: that were asked for.

    Returns:
        For each method ``method``, ``model``, ``parameters``, ``macs``, ``missing`` and ``failed`` (seeds), and
        ``metrics``: name to ``{"mean", "std", "n", "half_width" (of the mean's interval), "values" by seed,
        "difference"}``. A difference is
        ``{"mean", "half_width", "n", "seeds"}`` over the seeds that both have, on the same split; None where there
        are none, and for the baseline itself.
    """
    by_seed = {m: {c["seed"]: c for c in cells if c["method"] == m} for m in methods}
    reference = {s: c for s, c in by_seed[baseline].items() if c["result"]}
    rows = []
    for method in methods:
        mine = {s: by_seed[method][s] for s in seeds if s in by_seed[method] and by_seed[method][s]["result"]}
        flat = {s: flatten(c["result"]["networks"]["student"]) for s, c in mine.items()}
        base = {
            s: flatten(reference[s]["result"]["networks"]["student"]) for s in mine if _same_images(s, mine, reference)
        }
        metrics = summarise_metrics(flat)
        for name, entry in metrics.items():
            entry["difference"] = None if method == baseline else _difference(name, flat, base)
        network: dict[str, Any] = next((c["result"]["networks"]["student"] for c in mine.values()), {})
        rows.append(
            {
                "method": method, **{k: network.get(k) for k in ("model", "parameters", "macs")},
                "missing": [s for s in seeds if s not in mine],
                "failed": [s for s in seeds if s in by_seed[method] and by_seed[method][s]["state"] == "failed"],
                "chosen_on": (network.get("best") or {}).get("chosen_on"),
                "metrics": metrics,
            }
        )  # fmt: skip
    return rows


def teacher_rows(
    cells: Sequence[Mapping[str, Any]], teachers: Mapping[str, Mapping[str, Any] | None], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """Rows of the teachers of one place, as they are and with their prior removed; usually all methods share one."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for method in methods:
        keys = tuple(c["teacher_folder"] for c in cells if c["method"] == method)
        groups.setdefault(keys, []).append(method)
    rows = []
    for keys, sharing in groups.items():
        of = "" if len(groups) == 1 else f" of {', '.join(sharing)}"
        done = [r for r in (teachers.get(k) for k in keys) if r is not None]
        for name, words in (("teacher", "as is"), ("teacher_rectified", "prior removed")):
            flat = {r["provenance"]["seed"]: flatten(r["networks"][name]) for r in done}
            about = done[0]["networks"][name] if done else {}
            rows.append(
                {
                    "label": f"teacher{of}, {words}",
                    **{k: about.get(k) for k in ("model", "recipe", "parameters", "macs")},
                    "metrics": summarise_metrics(flat),
                }
            )
    return rows


def flatten(network: Mapping[str, Any]) -> dict[str, float | None]:
    """A network's metrics by one name each: ``last.top1``, ``last.groups.shot.few``, ``best.top1`` ..."""
    found: dict[str, float | None] = {}
    for part in ("last", "best"):
        values = network.get(part) or {}
        for name in ("epoch", *SCALARS, "worst_class"):
            if name in values:
                found[f"{part}.{name}"] = values[name]
        for rule, groups in values.get("groups", {}).items():
            found |= {f"{part}.groups.{rule}.{group}": accuracy for group, accuracy in groups.items()}
    return found


def summarise_metrics(by_seed: Mapping[int, Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Every metric's mean, sample standard deviation, number of seeds and values; None is left out of them."""
    names = dict.fromkeys(name for values in by_seed.values() for name in values)
    summary = {}
    for name in names:
        values = {s: v[name] for s, v in by_seed.items() if v.get(name) is not None}
        numbers = [float(x) for x in values.values() if x is not None]
        summary[name] = {
            **summarise(numbers)._asdict(),
            "half_width": mean_interval(numbers),
            "values": {str(s): x for s, x in values.items()},
        }
    return summary


def _same_images(seed: int, mine: Mapping[int, Any], reference: Mapping[int, Any]) -> bool:
    if seed not in reference:
        return False
    a, b = (cells[seed]["result"]["provenance"]["split_checksum"] for cells in (mine, reference))
    return bool(a == b)


def _difference(
    name: str, mine: Mapping[int, Mapping[str, float | None]], base: Mapping[int, Mapping[str, float | None]]
) -> dict[str, Any] | None:
    pairs = {s: (mine[s].get(name), base[s].get(name)) for s in mine if s in base}
    known = {s: (a, b) for s, (a, b) in pairs.items() if a is not None and b is not None}
    if not known:
        return None
    found = paired_difference([a for a, _ in known.values()], [b for _, b in known.values()])
    return {**found._asdict(), "seeds": list(known)}


def _notes(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of one place's numbers has to know."""
    notes = []
    done = [c["result"] for c in cells if c["result"]]
    for key, words in (("split_checksum", "data"), ("krdistill", "versions of krdistill"), ("device", "devices")):
        values = sorted({str(r["provenance"][key])[:12] for r in done})
        if len(values) > 1:
            notes.append(f"Not all cells were run on the same {words}: {', '.join(values)}.")
    for cell in cells:
        if cell["state"] == "failed":
            notes.append(f"{cell['method']}, seed {cell['seed']}: failed: {cell['message']}")
    return notes
