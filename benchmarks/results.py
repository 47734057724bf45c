"""Writes docs/results.md and its figures from the committed studies, or checks that they are current.

    python benchmarks/results.py [--check | --bars] [--studies DIR] [--docs DIR]

A study ``NAME`` is three files: ``benchmarks/studies/NAME.yaml``, whose leading comment says what it asks;
``benchmarks/results/studies/NAME.json``, the ``results.json`` that ``krdistill compare`` wrote; and, if there is one,
``benchmarks/studies/NAME.md``, what a person concludes from it, which is set into the page as it stands. Figures that
papers report come from ``benchmarks/results/published.yaml``.

``--bars`` prints how the default recipe stands to its rivals. ``--studies`` and ``--docs`` show studies that are not
committed, or not finished, on a page elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from krdistill.reporting.study import clear, difference_cell, mean_cell, pareto_points, pareto_table, rare_metric
from krdistill.reporting.tables import clean
from krdistill.study.statistics import Difference, paired_difference, summarise

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ASKED = ROOT / "benchmarks" / "studies"
STUDIES = ROOT / "benchmarks" / "results" / "studies"
PUBLISHED = ROOT / "benchmarks" / "results" / "published.yaml"
PRESETS = ROOT / "src" / "krdistill" / "presets"

FIRST = (
    "rivals",
    "tiny",
    "tiny-more",
    "tiny-penalty",
    "tuned",
    "tuning",
    "tuning-more",
    "design-draws",
    "design-head-digits",
    "design-head-text",
    "design-head-rows",
    "rivals-if50",
    "rivals-if10",
    "rivals-trained",
    "rivals-if",
    "text",
    "features",
    "timm",
    "recipes",
    "compression",
    "design-lrd",
    "design-rrd",
    "design-text",
    "design-tau",
    "design-tau-text",
    "design-tau-rows",
    "design-teachers",
    "design-overtrained",
    "design-teachers-text",
)
ALL, BALANCED, FEW = "last.top1", "last.balanced_accuracy", "last.groups.shot.few"
COLUMNS = (
    ("all", ALL),
    ("many", "last.groups.shot.many"),
    ("medium", "last.groups.shot.medium"),
    ("few", FEW),
    ("last third", "last.groups.thirds.tail"),
)
# What the default recipe is held against, in the studies that were made for it, and by how many points.
BAR_STUDIES = {"rivals": "CIFAR-100-LT, imbalance factor 100", "tiny": "Tiny-ImageNet-LT"}
TUNED = "tuned"  # every method at the setting that `tuning` chose for it
# The studies of methods against each other, in the overview: what they learned from, by the label of the data.
OVERVIEW = {
    "rivals": {"": "CIFAR-100-LT, imbalance factor 100"},
    "rivals-trained": {"": "CIFAR-100-LT, imbalance factor 100, a teacher trained to the end"},
    "rivals-if50": {"": "CIFAR-100-LT, imbalance factor 50"},
    "rivals-if10": {"": "CIFAR-100-LT, imbalance factor 10"},
    "tiny": {"": "Tiny-ImageNet-LT, imbalance factor 100"},
    "text": {"": "Banking77-LT (sentences), imbalance factor 50"},
    "features": {"": "digits as rows of numbers, imbalance factor 30"},
    "timm": {"": "digits, two networks of timm, imbalance factor 50"},
}
RIVALS = ("kd", "kd-balanced", "bkd", "ltkd", "dkd", "dive")
OVER_KD, OVER_BEST = 3.0, 1.0
PAPER_BARS = {("resnet32x4", "resnet8x4"): (54.0, 33.0), ("resnet50", "mobilenetv2"): (46.0, 25.0)}

Results = Mapping[str, Any]
Row = Mapping[str, Any]


# Reading --------------------------------------------------------------------------------------------------------------


def read_studies(folder: Path = STUDIES) -> dict[str, dict[str, Any]]:
    """Name to results of every study of a folder, the rivals first and the others by name after the known ones."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}
    known = [n for n in FIRST if n in found]
    return {n: found[n] for n in [*known, *(n for n in found if n not in known)]}


def asked(name: str) -> tuple[str, str]:
    """What a study asks, from the leading comment of its file: a title, and all of it."""
    path = ASKED / f"{name}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    comment = []
    for line in lines:
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# ").strip())
    if not comment:
        return name, ""
    first = comment[0]
    end = min((i for i in (first.find(mark) for mark in (":", ", ", ". ")) if i > 0), default=len(first.rstrip(".")))
    return first[:end], " ".join(comment)


def settings(results: Results, place: Row) -> dict[str, Any]:
    """Dotted key to value of a place's runs: the base's, under the study's own, under those of the place's labels."""
    study = results["study"]
    base = PRESETS / f"{study['base']}.yaml"
    layers = [yaml.safe_load(base.read_text(encoding="utf-8"))] if base.is_file() else []
    layers.append(study["set"])
    for axis, label in (("data", place["data"]), ("pairs", place["pair"]), ("teachers", place["teacher"])):
        layers.append(study[axis].get(label) or {})
    found: dict[str, Any] = {}
    for layer in layers:
        found |= dict(_flat(layer))
    return found


def _flat(values: Mapping[str, Any], path: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value


def default_method(results: Results) -> str | None:
    """Label of the default recipe with all its defaults, where the study has it."""
    return _plain_method(results, "krdistill")


def _plain_method(results: Results, recipe: str) -> str | None:
    for method in results["study"]["methods"]:
        options = {k for k, v in method.items() if k not in ("name", "label") and v not in (None, {})}
        if method["name"] == recipe and not options:
            return str(method["label"] or method["name"])
    return None


def _row(place: Row, method: str | None) -> Row | None:
    return next((r for r in place["rows"] if r["method"] == method), None)


def _mean(row: Row | None, metric: str) -> float | None:
    return (row["metrics"].get(metric) or {}).get("mean") if row else None


def ordered(place: Row) -> list[Row]:
    """The methods of a place that have been run, the best all-class mean first."""
    rows = [r for r in place["rows"] if _mean(r, ALL) is not None]
    return sorted(rows, key=lambda r: -r["metrics"][ALL]["mean"])


# Text -----------------------------------------------------------------------------------------------------------------


def _text(words: object) -> str:
    return clean(str(words)).replace("|", "\\|").replace("<", "&lt;")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A Markdown table; the first columns hold words, the others numbers."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * words + "--:|" * (len(head) - words)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def mean_words(entry: Mapping[str, Any] | None) -> str:
    """Mean, sample standard deviation and number of seeds, in percent, to two digits."""
    return mean_cell(entry, digits=2)


def gap_words(entry: Mapping[str, Any] | None) -> str:
    """A paired difference in points with its interval; bold where that leaves zero out.

    >>> gap_words({"mean": 0.02, "half_width": 0.01, "n": 3})
    '**+2.00 [+1.00, +3.00]** (n=3)'
    """
    words, mark, seeds = difference_cell(entry, digits=2).partition(" (n=")
    return f"**{words}**{mark}{seeds}" if clear(entry) else f"{words}{mark}{seeds}"


def _listed(words: Iterable[str]) -> str:
    *most, last = dict.fromkeys(words)
    return f"{', '.join(most)} and {last}" if most else last


# One study ------------------------------------------------------------------------------------------------------------


def place_title(place: Row) -> str:
    return ", ".join(_text(v) for v in (place["data"], place["pair"], place["teacher"]) if v)


def place_setting(results: Results, place: Row) -> str:
    """Data, networks and epochs of one place, in a line."""
    found, split = settings(results, place), place["split"]
    words = [f"`{_text(split['name'])}`"] if split else []
    if found.get("data.profile") == "none":
        words.append("taken as it is")
    elif found.get("data.imbalance_factor") is not None:
        words.append(f"imbalance factor {found['data.imbalance_factor']:g}")
    if split:
        words.append(
            f"{split['train_images']:,} training examples of {split['classes']} classes ({split['largest_class']:,} to "
            f"{split['smallest_class']:,} a class), {split['test_images']:,} test examples"
        )
    if found.get("data.image_size"):
        words.append(f"images of {found['data.image_size']} x {found['data.image_size']}")
    for what, rows in (("teacher", place["teachers"]), ("student", place["rows"])):
        models = dict.fromkeys(_text(r["model"]) for r in rows if r.get("model"))
        epochs = dict.fromkeys(
            f"{e:g}" for r in rows for e in (r["metrics"].get("last.epoch") or {"values": {}})["values"].values()
        )
        if models:
            words.append(f"{what} {_listed(models)}, {_listed(epochs)} epochs")
    return "; ".join(words) + "."


def study_table(results: Results, place: Row, published: Mapping[str, Any]) -> str:
    """The methods of a place, best first, and below them their teachers."""
    baseline = results["baseline"]
    rows, teachers = ordered(place), place["teachers"]
    shown = [(h, m) for h, m in COLUMNS if any(_mean(r, m) is not None for r in (*rows, *teachers))]
    rare = FEW if _mean(_row(place, baseline), FEW) is not None else rare_metric(place)
    rare_words = next((h for h, m in COLUMNS if m == rare), "rarest group")
    best = not _best_is_last(rows)
    papers = published_here(results, place, published)
    head = ["method", *(h for h, _ in shown), *(["all, best epoch"] if best else [])]
    head += [f"all, minus {_text(baseline)}", *([f"{rare_words}, minus {_text(baseline)}"] if rare else [])]
    head += ["published (all / last third)"] if papers else []
    lines = []
    for row in rows:
        is_base, metrics = row["method"] == baseline, row["metrics"]
        cells = [f"**{_text(row['method'])}**" if is_base else _text(row["method"])]
        cells += [mean_words(metrics.get(m)) for _, m in shown]
        cells += [mean_words(metrics.get("best.top1"))] if best else []
        gaps = [(metrics.get(m) or {}).get("difference") for m in (ALL, rare) if m]
        cells += ["baseline" if is_base else gap_words(g) for g in gaps]
        lines.append([*cells, *([papers.get(row["method"], "-")] if papers else [])])
    for row in teachers:
        if _mean(row, ALL) is not None:
            cells = [f"*{_text(row['label'])}*", *(mean_words(row["metrics"].get(m)) for _, m in shown)]
            cells += [mean_words(row["metrics"].get("best.top1"))] if best else []
            lines.append([*cells, *(["-"] * (len(head) - len(cells)))])
    return _table(head, lines)


def _best_is_last(rows: Sequence[Row]) -> bool:
    pairs = [((r["metrics"].get("best.epoch") or {}).get("values"), r["metrics"]["last.epoch"]["values"]) for r in rows]
    return all(best is None or best == last for best, last in pairs)


def study_words(name: str, results: Results, published: Mapping[str, Any]) -> str:
    """A study's part of the page."""
    title, question = asked(name)
    states = [c["state"] for c in results["cells"]]
    unfinished = "" if set(states) == {"done"} else f" **{states.count('done')} of {len(states)} cells are done.**"
    file = f"[{name}.yaml](../benchmarks/studies/{name}.yaml)"
    data = f"[{name}.json](../benchmarks/results/studies/{name}.json)"
    parts = [f"## {_text(name)}: {_text(title[:1].lower() + title[1:] if title[1:2].islower() else title)}"]
    parts.append(f"{_text(question)} {len(states)} cells: {file}, {data}.{unfinished}".strip())
    parts.append(_ran(results))
    several = len(results["places"]) > 1
    for entry in pareto_points(results):
        title = ", ".join(_text(v) for v in (entry["data"], entry["teacher"]) if v)
        parts += ["### Accuracy against size" + (f": {title}" if title else "")]
        parts.append(_table(*pareto_table(entry), words=3))
    for place in results["places"]:
        parts += [f"### {place_title(place)}"] if several else []
        parts.append(place_setting(results, place))
        if ordered(place):
            parts.append(study_table(results, place, published))
            if _best_is_last(ordered(place)):
                parts.append("In every run the best epoch was the last one, or only the last one was evaluated.")
        lacking = [f"{_text(r['method'])} ({', '.join(map(str, r['missing']))})" for r in place["rows"] if r["missing"]]
        parts += [f"Missing seeds: {', '.join(lacking)}."] if lacking else []
        parts += [f"- {_text(note)}" for note in place["notes"]]
    if figure(results):
        words = f"{_text(name)}: paired differences to {_text(results['baseline'])} with their intervals"
        parts.append(f"![{words}](img/results-{name}.svg)")
    concluded = ASKED / f"{name}.md"
    if concluded.is_file():
        parts.append("### What we conclude" + (f" from {_text(name)}" if several else ""))
        parts.append(concluded.read_text(encoding="utf-8").strip())
    return "\n\n".join(parts)


def _ran(results: Results) -> str:
    """Where, with what and for how long a study was run."""
    found = [c["result"] for c in results["cells"] if c["result"]] + list(results["teachers"].values())
    values: dict[str, list[str]] = {
        key: list(dict.fromkeys(_text(r["provenance"][key]) for r in found if r["provenance"].get(key) is not None))
        for key in ("device", "processor", "threads", "torch", "git")
    }
    words = [f"Seeds {', '.join(map(str, results['seeds']))}; baseline {_text(results['baseline'])}."]
    if found:
        processor = f" ({_listed(values['processor'])})" if values["processor"] else ""
        threads = f"{_listed(values['threads'])} thread{'' if values['threads'] == ['1'] else 's'} each"
        commit = f", commit {_listed(f'`{v}`' for v in values['git'])}" if values["git"] else ""
        hours = sum({r["key"]: r["seconds"] for r in found}.values()) / 3600
        words.append(
            f"Run on {_listed(values['device'])}{processor}, {threads}, torch {_listed(values['torch'])}{commit};"
        )
        words.append(f"{hours:.1f} hours of work.")
    return " ".join(words)


# Published figures ----------------------------------------------------------------------------------------------------


def read_published() -> dict[str, Any]:
    return dict(yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")))


def published_here(results: Results, place: Row, published: Mapping[str, Any]) -> dict[str, str]:
    """Label to published figures of the methods of a place whose data and networks are those of a paper's table."""
    found, split = settings(results, place), place["split"] or {}
    if found.get("data.image_size") or split.get("name") != "cifar100":  # the papers' images have their full size
        return {}
    teachers = {r["model"] for r in place["teachers"]}
    here = {}
    for entry in published["figures"]:
        label = _plain_method(results, entry["method"])
        row = _row(place, label)
        same = entry["teacher"] in teachers and entry["factor"] == found.get("data.imbalance_factor")
        if label and row and same and row["model"] == entry["student"]:
            here[label] = f"{entry['all']:.2f} / {_percent(entry['last_third'])}"
    return here


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def published_words(published: Mapping[str, Any]) -> str:
    """What the papers report, and the bars that are set for the paper-size table."""
    rows = []
    for f in published["figures"]:
        arxiv = published["papers"][f["paper"]]["arxiv"]
        pair = f"{f['teacher']} to {f['student']}" if f["teacher"] else f"{f['student']}, no teacher"
        rows.append(
            [f["method"], f"{f['data']}, {f['factor']}", pair, f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})",
             f["known"], _percent(f["all"]), _percent(f["last_third"])]
        )  # fmt: skip
    head = ["method", "data, imbalance factor", "networks", "source", "how it was read", "all", "last third"]
    papers = [f"- arXiv {p['arxiv']}: {p['title']}, {p['year']}." for p in published["papers"].values()]
    bars = [f"{t} to {s} above {a:g} / {b:g}" for (t, s), (a, b) in PAPER_BARS.items()]
    words = f"What we want to see there at imbalance factor 100, last epoch, all / last third: {_listed(bars)}."
    return "\n\n".join([_table(head, rows, words=5), "\n".join(papers), words])


# The bars -------------------------------------------------------------------------------------------------------------


def gap(mine: Row | None, other: Row | None, metric: str) -> Difference | None:
    """Paired difference of two rows of one place over the seeds both have."""
    if mine is None or other is None:
        return None
    a, b = ((r["metrics"].get(metric) or {"values": {}})["values"] for r in (mine, other))
    seeds = [s for s in a if s in b]
    return paired_difference([a[s] for s in seeds], [b[s] for s in seeds]) if seeds else None


def few_gap(results: Results, place: Row, method: str) -> tuple[Difference, float, float] | None:
    """Few-shot accuracy of a method minus that of its own teachers with their prior removed, and both means."""
    mine, theirs = [], []
    for cell in results["cells"]:
        here = (cell["data"], cell["pair"], cell["teacher"]) == (place["data"], place["pair"], place["teacher"])
        teacher = results["teachers"].get(cell["teacher_folder"])
        if here and cell["method"] == method and cell["result"] and teacher:
            few = [
                n["last"]["groups"]["shot"]["few"]
                for n in (cell["result"]["networks"]["student"], teacher["networks"]["teacher_rectified"])
            ]
            if None not in few:
                mine.append(few[0])
                theirs.append(few[1])
    if not mine:
        return None
    means = [summarise(v).mean for v in (mine, theirs)]
    return paired_difference(mine, theirs), means[0] or 0.0, means[1] or 0.0


def bars(results: Results, place: Row) -> list[tuple[str, str, str]]:
    """What the default recipe must show in a place: the bar, the figures, and yes, no or why neither."""
    label = default_method(results)
    ours = _row(place, label)
    if label is None or _mean(ours, ALL) is None:
        return [("the default recipe", "", "not run")]
    found = []
    for rival in RIVALS:
        what = f"above {rival}, all classes, interval without 0"
        d = gap(ours, _row(place, _plain_method(results, rival)), ALL)
        if d is None:
            found.append((what, "", "not run"))
            continue
        verdict = "one seed" if d.half_width is None else "yes" if d.mean > d.half_width else "no"
        found.append((what, f"{gap_words(d._asdict())}", verdict))
    plain = _rivals(results)
    rivals = [r for r in place["rows"] if r["method"] in plain and _mean(r, BALANCED) is not None]
    wanted = [("kd", _row(place, _plain_method(results, "kd")), OVER_KD)]
    if rivals:
        best = max(rivals, key=lambda r: r["metrics"][BALANCED]["mean"])
        wanted.append((f"the best rival ({_text(best['method'])})", best, OVER_BEST))
    for other, row, least in wanted:
        d = gap(ours, row, BALANCED)
        what = f"{least:g} point{'s' if least != 1 else ''} or more above {other}, balanced accuracy"
        verdict = "not run" if d is None else "yes" if 100 * d.mean >= least else "no"
        found.append((what, f"{gap_words(d._asdict())}" if d else "", verdict))
    for method in _rivals(results, helped=True):
        d = gap(ours, _row(place, method), ALL)
        if d is not None:
            what = f"above {_text(method)}, a rival with what we add, all classes, interval without 0"
            verdict = "one seed" if d.half_width is None else "yes" if d.mean > d.half_width else "no"
            found.append((what, gap_words(d._asdict()), verdict))
    few = few_gap(results, place, label)
    words = "few-shot accuracy above the teacher's own after prior removal"
    if few is None:
        found.append((words, "", "no such classes"))
    else:
        d, mine, theirs = few
        figures = f"{100 * mine:.2f} against {100 * theirs:.2f}, {gap_words(d._asdict())}"
        found.append((words, figures, "yes" if d.mean > 0 else "no"))
    return found


def headline(studies: Mapping[str, Results]) -> str:
    """How the default recipe stands to its rivals, from the studies made for it."""
    parts = []
    for name, what in BAR_STUDIES.items():
        results = studies.get(name)
        if results is None:
            parts.append(f"**{what}**: no results of the study `{name}` are committed yet, so nothing is claimed.")
            continue
        for place in results["places"]:
            title = ", ".join(v for v in (what, place_title(place)) if v)
            parts.append(f"**{title}.** {_standing(results, place)} All of it: [{name}](#{_anchor(name, results)}).")
            rows = [[bar, figures or "-", f"**{verdict}**"] for bar, figures, verdict in bars(results, place)]
            parts.append(_table(["the default recipe", "difference in points, 95 % interval", "holds"], rows, words=3))
    if TUNED in studies:
        parts += [tuned_words(studies[TUNED], place) for place in studies[TUNED]["places"]]
    return "\n\n".join(parts)


def tuned_words(results: Results, place: Row) -> str:
    """How KRDistill stands to the best rival where each of them has the setting that was chosen for it."""
    recipes = {m["label"] or m["name"]: m["name"] for m in results["study"]["methods"]}
    ranked = ordered(place)
    ours = next(r for r in ranked if recipes[r["method"]] == "krdistill")
    rival = next(r for r in ranked if not recipes[r["method"]].startswith("krdistill"))
    d, n = gap(ours, rival, ALL), len({recipes[r["method"]] for r in ranked})
    assert d is not None
    return (
        f"**Every method tuned alike** ({n} of them, four settings each, chosen on images that were put aside from the "
        f"training part): {_text(ours['method'])} {mean_words(ours['metrics'][ALL])}, the best rival "
        f"{_text(rival['method'])} {mean_words(rival['metrics'][ALL])}; {gap_words(d._asdict())} over it. All of it: "
        f"[{results['name']}](#{_anchor(results['name'], results)})."
    )


def overview(studies: Mapping[str, Results]) -> str:
    """The default recipe, plain distillation and the best rival on every data set that methods were compared on."""
    rows = []
    for name, labels in OVERVIEW.items():
        results = studies.get(name)
        for data, what in labels.items() if results is not None else ():
            assert results is not None
            place = next((p for p in results["places"] if (p["data"] or "") == data), None)
            if place is None:
                continue
            ours, kd = (_row(place, label) for label in (default_method(results), _plain_method(results, "kd")))
            if ours is None or kd is None:
                continue
            rival = _best_rival(results, place)
            rare = FEW if _mean(ours, FEW) is not None else rare_metric(place) or ALL
            cells = [what, mean_words(ours["metrics"][ALL]), mean_words(kd["metrics"][ALL])]
            cells.append("-" if rival is None else f"{mean_words(rival['metrics'][ALL])}, {_text(rival['method'])}")
            rows.append([*cells, *(f"{100 * r['metrics'][rare]['mean']:.1f}" if r else "-" for r in (ours, kd, rival))])
    head = ["all classes, %", "krdistill", "kd", "best other", "tail: krdistill", "kd", "best other"]
    return _table(head, rows)


def _best_rival(results: Results, place: Row) -> Row | None:
    """The method of the highest all-class mean that is none of ours, without what only our methods have by default."""
    rivals = _rivals(results)
    return next((r for r in ordered(place) if r["method"] in rivals), None)


def _rivals(results: Results, *, helped: bool = False) -> list[str]:
    """Labels of the methods that are none of ours; ``helped``: those to whom a study gives other draws or heads."""
    others = [m for m in results["study"]["methods"] if not m["name"].startswith("krdistill")]
    return [m["label"] or m["name"] for m in others if bool(m.get("set")) == helped]


def _standing(results: Results, place: Row) -> str:
    label = default_method(results)
    ours = _row(place, label)
    if ours is None or _mean(ours, ALL) is None:
        return "The default recipe has not been run."
    settings = {  # of the default recipe: another setting of it is no other method
        m["label"] for m in results["study"]["methods"] if m["name"] == "krdistill" and m["label"] not in (None, label)
    }
    ranked = [r["method"] for r in ordered(place) if r["method"] not in settings]
    rank = ranked.index(label) + 1
    others = [_row(place, _plain_method(results, r)) for r in ("kd", "kd-balanced")]
    rival = _best_rival(results, place)
    shown = list({r["method"]: r for r in (ours, rival, *others) if r and _mean(r, ALL) is not None}.values())
    words = [
        f"{_text(r['method'])} {mean_words(r['metrics'][ALL])}, few {mean_words(r['metrics'].get(FEW))}" for r in shown
    ]
    n = len(ranked)
    place_words = f"first of {n} methods" if rank == 1 else f"number {rank} of {n} methods"
    return f"By its all-class mean the default recipe is {place_words}. All classes: {'; '.join(words)}."


def _anchor(name: str, results: Results) -> str:
    heading = study_words(name, results, {"figures": []}).splitlines()[0].lstrip("# ")
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


# Figures --------------------------------------------------------------------------------------------------------------

INK, MUTED, LINE, UP, DOWN = "#23272e", "#6b7280", "#d9dde3", "#0072b2", "#d55e00"
ROW, PANEL, GAP, TOP = 19, 230, 66, 50  # pixels


def figure(results: Results) -> str:
    """Every method's paired difference to the baseline with its interval, over all classes and over the rarest, as SVG.

    Empty where there is no difference to show. The text is the same on every machine.
    """
    baseline = results["baseline"]
    blocks = []
    for place in results["places"]:
        rare = FEW if _mean(_row(place, baseline), FEW) is not None else rare_metric(place)
        rows = [r for r in ordered(place) if r["method"] == baseline or r["metrics"][ALL]["difference"]]
        if len(rows) > 1:
            blocks.append((place, (ALL, rare or ""), rows))
    if not blocks:
        return ""
    scales = []
    for i in range(2):
        ends = [0.0]
        for _, metrics, rows in blocks:
            for row in rows:
                d = (row["metrics"].get(metrics[i]) or {}).get("difference")
                if d:
                    ends += [100 * (d["mean"] + s * (d["half_width"] or 0)) for s in (-1, 1)]
        scales.append(_Scale(min(ends), max(ends)))
    names = [r["method"] for _, _, rows in blocks for r in rows] + [place_title(p) for p, _, _ in blocks]
    left = 18 + round(6.6 * min(30, max(map(len, names))))
    width = left + 2 * PANEL + 2 * GAP
    several = len(results["places"]) > 1
    differ = len({metrics[1] for _, metrics, _ in blocks}) > 1  # who is rare, from place to place
    out, y = [], TOP
    for place, metrics, rows in blocks:
        if several:
            out.append(_label(10, y + 13, place_title(place), weight="bold"))
            if differ:
                out.append(_label(left + PANEL + GAP, y + 13, _metric_words([metrics[1]]), color=MUTED))
            y += ROW + 2
        high = y + ROW * len(rows)
        for i, (scale, metric) in enumerate(zip(scales, metrics, strict=True)):
            x0 = left + i * (PANEL + GAP)
            for tick in scale.ticks:
                x = x0 + scale.at(tick)
                color, wide = (MUTED, 1.2) if tick == 0 else (LINE, 0.8)
                out.append(f'<path d="M{x:.1f} {y}V{high}" stroke="{color}" stroke-width="{wide}"/>')
                out.append(_label(x, high + 14, f"{tick:+g}" if tick else "0", "middle", MUTED, 10))
            for j, row in enumerate(rows):
                out += _dot(row, metric, baseline, scale, x0, y + ROW * j + ROW / 2)
        for j, row in enumerate(rows):
            bold = "bold" if row["method"] == baseline else "normal"
            out.append(_label(left - 10, y + ROW * j + 13.5, _short(row["method"]), "end", INK, weight=bold))
        y = high + 30
    words = ("all classes", "the rarest classes" if differ else _metric_words([blocks[0][1][1]]))
    heads = [_label(left + i * (PANEL + GAP), 40, w, weight="bold") for i, w in enumerate(words)]
    title = f"{results['name']}: accuracy minus that of {baseline}, in points, with the 95 % interval"
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{y}" rx="4" fill="#ffffff"/>',
        _label(10, 16, title, size=11, color=MUTED),
    ]
    return "\n".join([*head, *heads, *out, "</svg>"]) + "\n"


class _Scale:
    """A linear axis from at most ``low`` to at least ``high``, in points, with round ticks; 0 is one of them."""

    def __init__(self, low: float, high: float) -> None:
        room = 0.03 * ((high - low) or 1.0)
        self.low, self.high = low - room, high + room
        steps = (m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5))
        step = next(s for s in steps if (self.high - self.low) / s <= 6)
        self.ticks = [round(i * step, 4) for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]

    def at(self, value: float) -> float:
        return PANEL * (value - self.low) / (self.high - self.low)


def _dot(row: Row, metric: str, baseline: str, scale: _Scale, x0: float, y: float) -> list[str]:
    entry = row["metrics"].get(metric)
    if entry is None or entry["mean"] is None:
        return []
    if row["method"] == baseline:
        x = x0 + scale.at(0.0)
        words = f"{100 * entry['mean']:.1f} %"
        return [
            f'<path d="M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z" fill="{INK}"/>',
            _label(x0 + PANEL + 6, y + 4, words, color=INK, weight="bold"),
        ]
    d = entry["difference"]
    if d is None:
        return []
    color = (UP if d["mean"] > 0 else DOWN) if clear(d) else MUTED
    x, out = x0 + scale.at(100 * d["mean"]), []
    if d["half_width"] is not None:
        low, high = (x0 + scale.at(100 * (d["mean"] + s * d["half_width"])) for s in (-1, 1))
        out.append(f'<path d="M{low:.1f} {y:.1f}H{high:.1f}" stroke="{color}" stroke-width="1.6"/>')
    fill = color if clear(d) else "#ffffff"
    out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{fill}" stroke="{color}" stroke-width="1.6"/>')
    out.append(_label(x0 + PANEL + 6, y + 4, f"{100 * d['mean']:+.2f}", color=color))
    return out


def _label(
    x: float, y: float, words: str, anchor: str = "start", color: str = INK, size: int = 11, weight: str = "normal"
) -> str:
    extra = "" if anchor == "start" else f' text-anchor="{anchor}"'
    extra += "" if size == 11 else f' font-size="{size}"'
    extra += "" if weight == "normal" else f' font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}"{extra}>{escape(words)}</text>'


def _short(words: str) -> str:
    return words if len(words) <= 30 else f"{words[:29]}…"


def _metric_words(metrics: Sequence[str]) -> str:
    names = {FEW: "few (fewer than 20 training examples)", "last.groups.thirds.tail": "last third of the classes"}
    return _listed(names.get(m, "rarest group") for m in metrics)


# The page -------------------------------------------------------------------------------------------------------------


def page(studies: Mapping[str, Results], published: Mapping[str, Any]) -> str:
    """The whole of docs/results.md."""
    top = f"""\
# Results

This page is made by `python benchmarks/results.py` from the committed results of the studies; nobody types a number
here. What a person concludes stands under "What we conclude" of each study.

{overview(studies)}

Tail: the few-shot classes, or the rarest third where the groups are thirds.

{headline(studies)}

## How to read it

- Every mean is followed by ± the sample standard deviation over the seeds, and by the number of seeds, n. Accuracies
  are in percent, of the last epoch, on a balanced test set. Methods are sorted by their all-class mean.
- many, medium, few: classes of more than 100, 20 to 100, fewer than 20 training examples. Last third: the rarest 33 %
  of the classes. A column without classes is left out.
- A difference is paired by seed, in points, with its 95 % interval (Student's t). **Bold** ones leave zero out. With
  three seeds t is 4.3, so small differences stay open; and of twenty intervals about one leaves zero out by chance.
- The teachers stand below the methods, as they were trained and with their class prior removed.
- In the figures a filled dot is an interval that leaves zero out, a hollow one is not.

## The protocol

1. One study file says everything; `krdistill compare` runs it ([compare methods](howto-compare.md)).
2. All seeds see one cut of the data; a seed changes initial weights, order and augmentation, of teacher and student.
3. All methods of a seed share its teacher, its schedule and its number of epochs, unless the study asks about those.
4. The last epoch counts; what the best epoch reached has a column of its own.
5. Every cell keeps its configuration, commit and checksum of its split; results of a changed working tree are refused.

## What this is not

{scale_words(studies)}
The paper's equations are not public: what is measured here is our formulation of its two losses, and none of it can be
held against the paper's own tables. The defaults were chosen on the test images; what was chosen by one study is
confirmed where another data set or imbalance factor says the same. Which of four settings a method has in `tuned` was
chosen without them.

Runs of paper size (240 epochs; ResNet-32x4 to ResNet-8x4 and three other pairs, three imbalance factors, three seeds)
have not been made. They need a GPU; the commands are ready, and have been run for an epoch of a few images:

```console
krdistill compare benchmarks/studies/paper.yaml
krdistill compare benchmarks/studies/paper-ldam.yaml
```

and, on a machine that is lent for minutes at a time, one pair with one seed, which goes on where it stopped with
`--state gpu`:

```console
python benchmarks/gpu.py pack cifar100-lt.npz
python benchmarks/gpu.py run cifar100-lt.npz --out gpu --minutes 9
```

## Published figures

What papers report at their size, in percent; none of it was measured here, and no figure of ours at these sizes exists
yet. "own page": read in the authors' own README or page. "secondary": read in a third party's account of the paper, not
in the paper itself.

{published_words(published)}
"""
    parts = [top.rstrip(), *(study_words(name, results, published) for name, results in studies.items())]
    return "\n\n".join(parts) + "\n"


def scale_words(studies: Mapping[str, Results]) -> str:
    """How small the studies are, from what they ran."""
    sizes: dict[str, Any] = {}
    pairs: dict[str, None] = {}
    devices: dict[str, None] = {}
    for results in studies.values():
        for place in results["places"]:
            size = settings(results, place).get("data.image_size")
            sizes[f"{size} x {size}"] = size
            teachers = dict.fromkeys(r["model"] for r in place["teachers"] if r["model"])
            pairs |= {f"{t} to {r['model']}": None for t in teachers for r in place["rows"] if r["model"]}
        devices |= {c["result"]["provenance"]["device"]: None for c in results["cells"] if c["result"]}
    if not pairs:
        return "No study has been run yet."
    images = [s for s, size in sizes.items() if size]
    words = f"images of {_listed(images)}, " if images else ""
    return f"Everything on this page is small-scale: {words}{_listed(pairs)}, on {_listed(devices)}."


def files(studies: Mapping[str, Results]) -> dict[str, str]:
    """Path below docs/ to text: the page and one figure per study."""
    drawn = {f"img/results-{n}.svg": figure(r) for n, r in studies.items()}
    return {"results.md": page(studies, read_published()), **{k: v for k, v in drawn.items() if v}}


def stale(wanted: Mapping[str, str], docs: Path = DOCS) -> list[str]:
    """Files below docs/ that are not what they should be, and figures of studies that are gone."""
    differ = [n for n, t in wanted.items() if not (docs / n).is_file() or (docs / n).read_text("utf-8") != t]
    return differ + [f"img/{p.name}" for p in (docs / "img").glob("results-*.svg") if f"img/{p.name}" not in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is not current")
    parser.add_argument("--bars", action="store_true", help="change nothing; print what the default recipe must show")
    parser.add_argument("--studies", type=Path, default=STUDIES, metavar="DIR", help="folder of NAME.json files")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="DIR", help="where results.md and img/ are written")
    arguments = parser.parse_args()
    studies = read_studies(arguments.studies)
    if arguments.bars:
        for name, what in BAR_STUDIES.items():
            for place in studies[name]["places"] if name in studies else []:
                print(", ".join(v for v in (name, what, place_title(place)) if v))
                for bar, figures, verdict in bars(studies[name], place):
                    print(f"  {verdict:16}{bar}: {figures.replace('**', '') or '-'}")
            if name not in studies:
                print(f"{name}, {what}: not run")
        return
    wanted = files(studies)
    old = stale(wanted, arguments.docs)
    if arguments.check:
        if old:
            sys.exit(f"{', '.join(old)}: not what the committed results give; run python benchmarks/results.py")
        return
    (arguments.docs / "img").mkdir(parents=True, exist_ok=True)
    for name in old:
        path = arguments.docs / name
        if name in wanted:
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()


if __name__ == "__main__":
    main()
