"""The card of a shared network: what it is, how good it is on whom, what it is not for; from a run's files alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import ConfigError
from ..kinds import NOUNS
from ..recipes import Recipe, recipe
from .tables import NA, chosen_on, clean, comparison_columns, networks, percent, summary_sentences

if TYPE_CHECKING:
    from .html import RunFiles

# What the Hub calls the task, by the kind of the examples.
TASKS = {"image": "image-classification", "text": "text-classification", "features": "tabular-classification"}
_GIVEN = {"image": "photos/", "text": "sentences.txt", "features": "rows.csv"}  # an example of what it is asked about
_SHOWN = 20  # classes of a group that are named
_PLACES = ("/", ".", "~")  # how the path of a folder begins, and no name on a hub
_FEW = 20  # test images of a class, below which its accuracy says little
_MEANING = re.compile(r"([\\`*_\[\]<>|~&@$]|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def model_card(
    files: RunFiles, network: Mapping[str, Any], *, title: str, license: str | None = None, onnx: str | None = None,
    calibrator: str | None = None,
) -> str:  # fmt: skip
    """A card in Markdown with the YAML head that the Hugging Face Hub reads.

    Names of classes, groups and data are shown as text: nothing in them becomes markup or a link.

    Args:
        files: of the run (:func:`~krdistill.reporting.html.read_run`).
        network: the student's card (:meth:`krdistill.Network.card`).
        title: of the page.
        license: its name on the Hub, such as ``apache-2.0``; left out where it is not given.
        onnx: name of the file for the device, where one lies beside the card.
        calibrator: what the calibrator is that lies beside the card, in words.
    """
    files = replace(files, metrics=_portable(files.metrics))
    student = files.metrics["student"]
    split = files.split or {}
    data = str(split.get("name") or files.config.get("data", {}).get("source") or "the data")
    K, noun = len(network["class_names"]), NOUNS[network.get("kind", "image")]
    parts = [
        _head(student, network, title, data, license),
        f"# {md(title)}",
        "\n".join(_what(files, student, network, data)),
        "\n\n".join(["## Use", _use(network, onnx, calibrator)]),
        "\n\n".join(
            ["## Accuracy", *map(md, summary_sentences(files.metrics, noun)), *_accuracy(files, student, noun)]
        ),
        "\n\n".join(["## Training data", *_data(split, data, noun)]),
        "\n\n".join(["## What it is for, and what not", *_intended(data, K)]),
        "\n\n".join(["## Limits", "\n".join(f"- {line}" for line in _limits(files, student, split, noun))]),
        "\n\n".join(["## Where it comes from", *_provenance(files, student)]),
    ]
    return "\n\n".join(parts) + "\n"


def md(text: object) -> str:
    r"""Text that Markdown shows as it is: no markup, no HTML, no link, no line break.

    >>> print(md("a|b <img> [x](http://y)"))
    a\|b \<img\> \[x\](http\://y)
    """
    return _MEANING.sub(r"\\\1", clean(text))


def _head(student: Mapping[str, Any], network: Mapping[str, Any], title: str, data: str, license: str | None) -> str:
    task = TASKS[network.get("kind", "image")]
    known = [(f"Accuracy, {n} classes", g["accuracy"]) for n, g in student["groups"].items()]
    scores = [("Accuracy", student["top1"]), ("Balanced accuracy", student["balanced_accuracy"]), *known]
    values = {
        "library_name": "krdistill",
        "pipeline_tag": task,
        **({"license": license} if license else {}),
        "tags": ["krdistill", "knowledge-distillation", "long-tailed", "class-imbalance"],
        "model-index": [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": task},
                        "dataset": {"type": clean(data), "name": clean(data), "split": student.get("split", "test")},
                        "metrics": [
                            {"type": "accuracy", "name": clean(name), "value": round(value, 6)}
                            for name, value in scores
                            if value is not None
                        ],
                    }
                ],
            }
        ],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _what(files: RunFiles, student: Mapping[str, Any], network: Mapping[str, Any], data: str) -> list[str]:
    teacher, by = files.metrics.get("teacher"), f"by krdistill's recipe {md(_recipe_name(files, student))}"
    lines = [
        f"A {md(student['model'])} with {student['parameters']:,} parameters that tells "
        f"{len(network['class_names'])} classes of {md(data)} apart. It takes {_rows(network)}.",
        f"It was distilled from a {md(teacher['model'])} with {teacher['parameters']:,} parameters {by}."
        if teacher
        else f"It was trained without a teacher {by}.",
        "Its training data are long-tailed: a few classes hold most of the examples. Accuracy is therefore told for "
        "the frequent and for the rare classes apart.",
    ]
    return lines


def _rows(network: Mapping[str, Any]) -> str:
    """What it is given, in words."""
    kind, C = network.get("kind", "image"), network["channels"]
    if kind != "image":
        return "sentences" if kind == "text" else f"vectors of {C} numbers"
    H, W = network["image_size"]
    colour = {1: "grey", 3: "RGB"}.get(C, f"{C}-channel")
    return f"{colour} images of {H}x{W} pixels"


def _use(network: Mapping[str, Any], onnx: str | None, calibrator: str | None) -> str:
    name = str((network.get("architecture") or {}).get("name"))
    own = "" if not name.startswith("module:") else f", allow_factories=[{name!r}]"
    kind, C = network.get("kind", "image"), network["channels"]
    more = "from krdistill.kinds import encode_texts\n" if kind == "text" else ""
    if kind == "image":
        H, W = network["image_size"]
        rows = f"torch.zeros(1, {C}, {H}, {W}, dtype=torch.uint8)  # raw images (B, C, H, W), or float in [0, 1]"
    elif kind == "text":
        rows = 'torch.from_numpy(encode_texts(["a sentence", "and another one"]))'
    else:
        rows = f"torch.zeros(1, {C})  # raw vectors (B, D)"
    text = f"""Class names and whatever is done to the input before the network are inside.

```python
import torch
from krdistill import HubNetwork
{more}
network = HubNetwork.from_pretrained("path/to/this/folder"{own})  # or OWNER/NAME on the Hub
rows = {rows}
probabilities = network(rows).logits.softmax(1)
print([network.class_names[int(k)] for k in probabilities.argmax(1)])
```
"""
    if own:
        text += f"\nThe network is built by `{name}`: that module must be importable, and you must trust it.\n"
    if calibrator:
        text += f"""
Beside the weights lies a calibrator, {md(calibrator)}, fitted on examples that were not trained on. It is applied where
you ask for it, `HubNetwork.from_pretrained(..., calibrated=True)`, and the figures below are without it.
"""
    if onnx:
        text += f"""
Without torch, from the ONNX file (`pip install 'krdistill[runtime]'`):

```console
krdistill predict {onnx} {_GIVEN[kind]}
```
"""
    return text.rstrip()


def _accuracy(files: RunFiles, student: Mapping[str, Any], noun: str) -> list[str]:
    rows = networks(files.metrics)
    columns = comparison_columns(rows, noun)
    cells = zip(*(c.cells for c in columns), strict=True)
    table = [[md(r.label), md(r.metrics.get("model") or NA), *map(md, c)] for r, c in zip(rows, cells, strict=True)]
    best = student.get("best")
    text = (
        f"Measured on {student['images']:,} {md(student.get('split', 'test'))} {noun} that were not trained on. Every "
        "figure is of the last epoch; *balanced* is the mean of the classes' accuracies, *harmonic* their harmonic "
        "mean, *ECE* the expected calibration error."
    )
    if best:
        where = chosen_on(student)
        text += f" The best epoch stands in the last column alone: it was chosen on the {md(where)} {noun}" + (
            ", and flatters." if where == "test" else "."
        )
    rule = (files.split or {}).get("groups", {}).get("rule")
    groups = [f"Groups of classes: {md(rule)}."] if rule else []
    return [_pipes(["network", "model", *(md(c.header) for c in columns)], table), text, *groups]


def _portable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, with networks named without what is of one machine: the place of a folder, the file of weights."""

    def short(row: Any) -> Any:
        if not isinstance(row, Mapping) or "model" not in row:
            return row
        origin, colon, rest = str(row["model"]).partition("?")[0].partition(":")
        return {**row, "model": origin + colon + (rest.rpartition("/")[2] if rest.startswith(_PLACES) else rest)}

    shortened = {key: short(row) for key, row in metrics.items()}
    return {**shortened, "baselines": {key: short(row) for key, row in (metrics.get("baselines") or {}).items()}}


def _data(split: Mapping[str, Any], data: str, noun: str) -> list[str]:
    if not split:
        return [f"{md(data)}. Nothing more is known of it."]
    counts, names, groups = split["counts"], split["class_names"], split["groups"]
    lines = [
        f"{md(data)}: {sum(counts):,} training {noun} of {len(names)} classes, from {min(counts):,} to "
        f"{max(counts):,} per class (imbalance factor {max(counts) / max(1, min(counts)):.4g}). The student was "
        "trained on these, and so was its teacher."
    ]
    tested = split.get("test_counts")
    rows = []
    for g, group in enumerate(groups["names"]):
        members = [k for k in range(len(names)) if groups["index"][k] == g]
        members.sort(key=lambda k: -counts[k])
        listed = ", ".join(md(names[k]) for k in members[:_SHOWN])
        more = f" and {len(members) - _SHOWN} more" if len(members) > _SHOWN else ""
        rows.append(
            [
                md(group), f"{len(members)}", f"{sum(counts[k] for k in members):,}",
                f"{sum(tested[k] for k in members):,}" if tested else NA, (listed + more) or "none",
            ]
        )  # fmt: skip
    headers = ["group", "classes", f"training {noun}", f"test {noun}", "which, the most frequent first"]
    return [*lines, _pipes(headers, rows), *(md(note) for note in split.get("notes", ()))]


def _intended(data: str, K: int) -> list[str]:
    return [
        f"For telling the {K} classes above apart on data like {md(data)}, where the rare classes matter as "
        "much as the frequent ones, on a device that has no room for the teacher.",
        "Not for data of another kind or of other classes: it always answers one of its classes. Not for decisions "
        "about people or safety that nobody looks at. What else was not measured here is not known: other sources, "
        "other places, other times, changed or hostile input.",
    ]


def _limits(files: RunFiles, student: Mapping[str, Any], split: Mapping[str, Any], noun: str) -> list[str]:
    lines = []
    known = [(n, g) for n, g in student["groups"].items() if g["accuracy"] is not None]
    if known:
        name, group = known[-1]
        lines.append(
            f"On its rarest group ({md(name)}, {group['classes']} classes) it is right on {percent(group['accuracy'])} "
            f"of the {noun}, over all on {percent(student['top1'])}."
        )
    never = sum(a == 0 for a in student["per_class"] if a is not None)
    if never:
        lines.append(f"On {never} of {len(student['per_class'])} classes it was never right.")
    worst = student["worst_class"]
    lines.append(f"Its worst class is {md(worst['name'])}, with {percent(worst['accuracy'])}.")
    lines.append(
        f"Its probabilities are off by {percent(student['ece'])} on average (expected calibration error)"
        + "".join(f", {percent(g['ece'])} on {md(n)}" for n, g in known if g.get("ece") is not None)
        + "."
    )
    tested = [n for n in split.get("test_counts", ()) if n]
    if tested and min(tested) < _FEW:
        lines.append(f"Some classes have as few as {min(tested)} test {noun}: their accuracies say little.")
    lines.append("One training with one seed; how much another seed changes was not measured here.")
    if _classification(files, student) == "balanced-softmax":
        lines.append(
            "It answers as if all classes were equally likely. Where they are not, multiply the probabilities by how "
            "frequent the classes are (`krdistill predict --prior`)."
        )
    return lines


def _provenance(files: RunFiles, student: Mapping[str, Any]) -> list[str]:
    found = files.provenance
    facts = {
        "krdistill": found.get("krdistill"),
        "commit": found.get("git"),
        "torch": found.get("torch"),
        "python": found.get("python"),
        "processor": found.get("processor"),
        "started": found.get("started"),
        "seed": found.get("seed"),
        "recipe": _recipe_name(files, student),
        "epochs": student.get("epochs"),
        "split checksum": files.metrics.get("split_checksum"),
    }
    rows = [[name, md(value)] for name, value in facts.items() if value is not None]
    export = files.export or {}
    if export.get("sentence"):
        rows.append(["export", md(export["sentence"])])
    method = _recipe(files, student)
    sources = dict.fromkeys(r.source for r in (recipe("krdistill"), method) if r is not None)
    cited = [
        f"- {md(s.title)} ({s.year})" + (f", [arXiv {s.arxiv}](https://arxiv.org/abs/{s.arxiv})" if s.arxiv else "")
        for s in sources
    ]
    return [_pipes(["what", "value"], rows), "## To cite", "\n".join(cited)]


def _recipe_name(files: RunFiles, student: Mapping[str, Any]) -> str:
    """The recipe itself; the row of the metrics may hold a label of the user's."""
    return str(files.config.get("recipe", {}).get("name") or student["recipe"])


def _recipe(files: RunFiles, student: Mapping[str, Any]) -> Recipe | None:
    try:
        return recipe(_recipe_name(files, student))
    except ConfigError:  # one that this installation does not have
        return None


def _classification(files: RunFiles, student: Mapping[str, Any]) -> str | None:
    method = _recipe(files, student)
    options = {k: v for k, v in files.config.get("recipe", {}).items() if k not in ("name", "label")}
    return None if method is None else method.resolve(options).classification


def _pipes(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
