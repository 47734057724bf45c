"""The HTML page of a run, made from the files in its folder and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..config import parse_yaml, read_text
from ..errors import ConfigError, MissingDependencyError, RunFolderError
from ..evaluation.abstaining import coverage_table
from ..files import read_arrays, read_json, write_text
from ..kinds import noun_of
from . import tables
from .tables import NA, NetworkRow, clean, percent

try:
    import jinja2
    from markupsafe import Markup

    from . import calibration, figures
except ImportError as error:
    raise MissingDependencyError(
        f"The report needs the package {error.name}: pip install 'krdistill[train]'."
    ) from None

REPORT = "report.html"
COSTS = "device.json"  # what bench-device --save leaves in a run's folder
MEASURED = ".device.json"  # what bench-device --save adds to a file's name
_PARTS = (("train", "training"), ("val", "validation"), ("test", "test"))
LISTED_CLASSES = 2000  # more classes than this are not listed one by one; metrics.json holds them


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; None or empty where a file is missing."""

    metrics: dict[str, Any]
    split: dict[str, Any] | None
    diagnosis: dict[str, Any] | None
    predictions: dict[str, np.ndarray] | None
    provenance: dict[str, Any]
    config: dict[str, Any]
    export: dict[str, Any] | None
    calibration: dict[str, Any] | None
    log: list[dict[str, Any]]
    exports: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> figures.Classes | None:
        if self.split is None:
            return None
        groups = self.split["groups"]
        return figures.Classes(
            self.split["class_names"], self.split["counts"], groups["names"], groups["index"], self.noun
        )

    @property
    def noun(self) -> str:
        """What the data are, in a word: images, rows or sentences."""
        return noun_of(self.split)


def write(run_dir: Path) -> Path:
    """Writes the page; see :func:`krdistill.reporting.write_report`."""
    path = run_dir / REPORT
    write_text(path, render(read_run(run_dir), title=run_dir.resolve().name))
    return path


def read_run(run_dir: Path) -> RunFiles:
    """Reads what the page is made of.

    Raises:
        RunFolderError: no ``metrics.json``, or a file is damaged or does not fit the others.
    """
    if not run_dir.is_dir():
        raise RunFolderError(f"No folder {str(run_dir)!r}. Expected the folder of a run.")
    metrics = _read(run_dir / "metrics.json")
    if metrics is None:
        raise RunFolderError(
            f"No metrics.json in {run_dir}: its evaluation stage has not run. Finish the run first "
            f"(krdistill run with the same configuration and --out {run_dir} goes on where it stopped)."
        )
    if not isinstance(metrics, dict) or not tables.networks(metrics):
        raise RunFolderError(f"{run_dir / 'metrics.json'} names no network. Delete it and run again.")
    split = _read(run_dir / "split.json")
    files = RunFiles(
        metrics=metrics,
        split=split,
        diagnosis=_read(run_dir / "teacher" / "diagnosis.json"),
        predictions=_predictions(run_dir / "predictions.npz"),
        provenance=_read(run_dir / "provenance.json") or {},
        config=_config(run_dir / "config.yaml"),
        export=_read(run_dir / "export.json"),
        calibration=_calibration(run_dir / "calibration.json", split),
        log=_log(run_dir / "log.jsonl"),
        exports=_named(run_dir / "exports", ".json"),
        measured={**_costs(run_dir), **_named(run_dir, MEASURED), **_named(run_dir / "exports", MEASURED)},
    )
    if split is not None:
        K = len(split["class_names"])
        for row in tables.networks(metrics):
            if len(row.metrics["per_class"]) != K:
                raise RunFolderError(
                    f"metrics.json ({row.key}) speaks of {len(row.metrics['per_class'])} classes, split.json of {K}. "
                    f"Delete metrics.json in {run_dir} and run again."
                )
    return files


def render(files: RunFiles, *, title: str) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    environment.filters.update(percent=percent, count=tables.count)
    source = resources.files(__package__).joinpath("template.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source).render(_content(files, title))


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


# Content --------------------------------------------------------------------------------------------------------------


def _content(files: RunFiles, title: str) -> dict[str, Any]:
    rows = tables.networks(files.metrics)
    classes = files.classes
    student = next((r for r in rows if r.key == "student"), None)
    teacher = next((r for r in rows if r.key == "teacher"), None)
    reference = tables.reference(files.metrics) or teacher
    gain = None
    if classes and student and reference:
        gain = {
            "figure": Markup(figures.class_gain(classes, student, reference, figures.network_colors(rows))),
            "against": reference.label,
        }
    diagnosis = files.diagnosis
    bias = None
    if classes and diagnosis:
        bias = Markup(figures.teacher_bias(classes, diagnosis["before"], diagnosis.get("after")))
    return {
        "title": files.config.get("name") or title,
        "files": files,
        "rows": rows,
        "noun": files.noun,
        "split_name": rows[0].metrics.get("split") or "test",
        "rule": (files.split or {}).get("groups", {}).get("rule"),
        "facts": _facts(files),
        "sentences": tables.summary_sentences(files.metrics, files.noun),
        "comparison": _comparison(rows, files.noun),
        "histogram": Markup(figures.class_histogram(classes)) if classes else None,
        "bias": bias,
        "bias_rows": _bias_rows(diagnosis) if diagnosis else [],
        "lowest_ratio": round(1 / figures.LOWEST_RATIO),
        "group_bars": _panels(figures.group_bars(rows, files.noun)) if tables.group_names(rows) else [],
        "gain": gain,
        "class_rows": _class_rows(files, rows),
        "listed_classes": LISTED_CLASSES,
        "reliability": _panels(figures.reliability(rows, files.predictions)) if files.predictions else [],
        "abstaining": _abstaining(files, student),
        "calibrations": _calibrations(files.calibration, rows),
        "devices": _devices(files),
        "confusions": [_confusion(r) for r in rows if r.metrics.get("group_confusion")],
        "curves": _panels(figures.training_curves(files.log, rows)) if files.log else [],
        "corrections": _panels(figures.correction_rates(files.log, rows, files.noun)) if files.log else [],
        "provenance": _flat(files.provenance),
        "config": _flat(files.config),
        "NA": NA,
    }


def _abstaining(files: RunFiles, student: NetworkRow | None) -> dict[str, Any] | None:
    """Headers and lines: what the student answers, and how rightly, where it must be sure."""
    known = files.predictions or {}
    if student is None or files.split is None or f"{student.key}.confidence" not in known:
        return None
    labels, split = known["labels"], files.split["groups"]
    if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(split["index"]):
        return None
    group = np.asarray(split["index"])[labels]
    table = coverage_table(
        known[f"{student.key}.confidence"].clip(0, 1),
        known[f"{student.key}.prediction"] == labels,
        groups={name: group == i for i, name in enumerate(split["names"])},
    )
    there = [name for name, found in table[0]["groups"].items() if found is not None]
    lines = []
    for row in table:
        cells = [row, *(row["groups"][name] for name in there)]
        words = [
            f"{percent(c['coverage'])}, right {NA if c['accuracy'] is None else percent(c['accuracy'])}" for c in cells
        ]
        lines.append([f"{row['threshold']:g}", *words])
    return {"headers": ["abstain below", "all", *there], "lines": lines}


def _panels(drawn: Sequence[str]) -> list[Markup]:
    return [Markup(svg) for svg in drawn]  # made and escaped by figures.py


def _facts(files: RunFiles) -> list[tuple[str, str]]:
    """The line under the title: what was learnt from, and how."""
    facts = []
    if files.split:
        s = files.split
        counts = s["counts"]
        factor = s.get("imbalance_factor")
        facts.append(
            (
                "data",
                f"{s['name']}, {len(counts):,} classes of {max(counts):,} to {min(counts):,} training {files.noun}"
                + (f" (imbalance factor {factor:.4g})" if factor else ""),
            )
        )
        parts = {what: s.get(f"{key}_images") for key, what in _PARTS}
        facts.append((files.noun, ", ".join(f"{n:,} {what}" for what, n in parts.items() if n)))
        facts.append(("groups", s["groups"]["rule"]))
    p = files.provenance
    if p.get("seed") is not None:
        facts.append(("seed", str(p["seed"])))
    if p.get("started"):
        facts.append(("started", _date(p["started"])))
    if p.get("seconds"):
        facts.append(("took", _duration(sum(p["seconds"].values()))))
    return facts


def _comparison(rows: Sequence[NetworkRow], noun: str) -> dict[str, Any]:
    """The headline table; the best student of a column is marked where there are several."""
    columns = tables.comparison_columns(rows, noun)
    students = [i for i, r in enumerate(rows) if r.is_student]
    marked = set()
    for c, column in enumerate(columns):
        known = [column.values[i] for i in students if column.values[i] is not None]
        if column.better and len(set(known)) > 1:
            best = (max if column.better == "high" else min)(v for v in known if v is not None)
            marked |= {(i, c) for i in students if column.values[i] == best}
    lines = []
    for i, row in enumerate(rows):
        cells = [
            {"text": column.cells[i], "best": (i, c) in marked, "apart": column.header.startswith("best")}
            for c, column in enumerate(columns)
        ]
        lines.append({"row": row, "cells": cells})
    return {"columns": columns, "lines": lines, "marked": bool(marked)}


def _bias_rows(diagnosis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line per group: what the teacher gives it, before and after."""
    after = (diagnosis.get("after") or {}).get("groups", {})
    training = (diagnosis.get("training") or {}).get("groups", {})
    shown = (("ratio", "{:.2f}"), ("accuracy", "{:.1%}"), ("ece", "{:.1%}"), ("entropy", "{:.2f}"))
    lines = []
    for name, row in diagnosis["before"]["groups"].items():
        cells = []
        for key, form in shown:
            values = [row[key], *([after[name][key]] if name in after else [])]
            cells.append(NA if row[key] is None else " → ".join(form.format(v) for v in values))
        lines.append({"name": name, "classes": row["classes"], "cells": cells, "error": training.get(name)})
    return lines


def _class_rows(files: RunFiles, rows: Sequence[NetworkRow]) -> list[dict[str, Any]]:
    classes = files.classes
    if classes is None or len(classes.names) > LISTED_CLASSES:
        return []
    tested = (files.split or {}).get("test_counts")
    return [
        {
            "name": classes.names[k],
            "group": classes.groups[classes.group_of[k]],
            "train": classes.counts[k],
            "test": tested[k] if tested else None,
            "accuracy": [r.metrics["per_class"][k] for r in rows],
        }
        for k in classes.order.tolist()
    ]


def _devices(files: RunFiles) -> list[tuple[list[str], list[list[str]]]]:
    """Exported files and their accuracy before and after; what they cost where they were measured."""
    try:
        exported = [
            [e["file"], e["precision"], f"{e['bytes'] / 1024:,.0f} KiB", percent(e["before"]["top1"]),
             percent(e["after"]["top1"]), *(percent(e[when]["groups"].get(e["drop"]["rarest_group"]))
             for when in ("before", "after")), f"{e['largest_difference']:.1e}", percent(e["agreement"])]
            for e in files.exports.values()
        ]  # fmt: skip
        measured = [
            [m["file"], m["processor"], f"{m['bytes'] / 1024:,.0f} KiB", tables.count(m["parameters"]),
             tables.count(m["macs"]), f"{r['threads']}", f"{r['batch']}", f"{r['median_ms']:.3f} ms",
             f"{r['p95_ms']:.3f} ms", f"{r['peak_bytes'] / 2**20:,.1f} MiB"]
            for m in files.measured.values() for r in m["runs"]
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"A record of an exported file is damaged ({error!r}). Export it again.") from None
    made = [
        (["file", "precision", "size", "all, before", "all, after", "rarest group, before", "rarest group, after",
          "largest difference", "same class"], exported),
        (["file", "processor", "size", "parameters", "MACs", "threads", "batch", "median", "95th percentile",
          "peak memory"], measured),
    ]  # fmt: skip
    return [(header, lines) for header, lines in made if lines]


def _costs(run: Path) -> dict[str, Any]:
    """What ``bench-device --save`` found of a run's networks, by file."""
    found = _read(run / COSTS)
    try:
        return {} if found is None else {f"{COSTS}: {m['file']}": m for m in found["files"]}
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{run / COSTS} is damaged ({error!r}). Measure it again.") from None


def _named(folder: Path, ending: str) -> dict[str, Any]:
    """JSON files of a folder, by name; those of measurements are none of ``.json`` alone."""
    found = sorted(folder.glob(f"*{ending}")) if folder.is_dir() else []
    return {p.name: _read(p) for p in found if ending == MEASURED or not p.name.endswith(MEASURED)}


def _calibrations(found: Mapping[str, Any] | None, rows: Sequence[NetworkRow]) -> list[dict[str, Any]]:
    """Every calibrated network: its errors before and after as tables, and its reliability."""
    labels = {r.key.removeprefix("baselines/"): r.label for r in rows}
    try:
        return [
            {
                "label": labels.get(key, key),
                "method": entry["method"],
                "tables": tables.calibration_rows(entry),
                "panels": _panels(calibration.panels_as_svg(entry, name=f"n{i}", title=labels.get(key, key))),
                "notes": entry["notes"],
            }
            for i, (key, entry) in enumerate((found or {}).get("networks", {}).items())
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"calibration.json is damaged ({error!r}). Delete it and calibrate again.") from None


def _confusion(row: NetworkRow) -> dict[str, Any]:
    table = row.metrics["group_confusion"]
    return {"label": row.label, "names": list(table), "rows": [(n, list(r.values())) for n, r in table.items()]}


def _flat(value: Any, path: str = "") -> list[tuple[str, str]]:
    """Nested data as lines ``a.b``, value."""
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _flat(item, f"{path}.{key}" if path else str(key))]
    if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        return [line for i, item in enumerate(value) for line in _flat(item, f"{path}[{i}]")]
    if isinstance(value, list):
        return [(path, ", ".join(map(str, value)) or "none")]
    if value is None or isinstance(value, bool):
        return [(path, "none" if value is None else "yes" if value else "no")]
    return [(path, str(value))]


def _date(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def _duration(seconds: float) -> str:
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60} min"


# Reading --------------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """A JSON file's data, or None where there is no file."""
    if not path.is_file():
        return None
    try:
        return read_json(path)
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}). Delete it and run again.") from None


def _calibration(path: Path, split: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``calibration.json``; one about other data than the run's is passed over."""
    found: dict[str, Any] | None = _read(path)
    if found is None or split is None or found.get("split_checksum") != split.get("checksum"):
        return None
    return found


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = parse_yaml(read_text(path), str(path))
    except ConfigError as error:
        raise RunFolderError(f"{path} is damaged ({error}).") from None
    if not isinstance(values, dict):
        raise RunFolderError(f"{path} is damaged: expected sections, got {type(values).__name__}.")
    return values


def _log(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the line that a killed run was writing
        if isinstance(entry, dict) and {"stage", "epoch"} <= entry.keys():
            lines.append(entry)
    return lines


def _predictions(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        arrays = read_arrays(path)
        shapes = {a.shape for a in arrays.values()}
        if "labels" not in arrays or len(shapes) != 1:
            raise ValueError(f"arrays {sorted(arrays)} of shapes {sorted(shapes)}")
    except (ValueError, OSError) as error:
        raise RunFolderError(f"{path} is damaged ({error}). Delete it and metrics.json, and run again.") from None
    return arrays
