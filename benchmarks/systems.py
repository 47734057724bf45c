"""Writes the figures of calibration, DLSA, condensed sets and the crash test into their pages, or checks them.

python benchmarks/systems.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
SETS = {
    "cifar100-lt": "CIFAR-100-LT, imbalance factor 100, 16 x 16",
    "banking77-lt": "Banking77-LT, imbalance factor 50",
    "cifar": "Ten classes of CIFAR-100-LT, imbalance factor 100",
    "digits": "Handwritten digits, imbalance factor 50",
}
KINDS = {"hard": "hard labels", "soft": "the teacher's", "adsa": "rectified by ADSA"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def cell(value: dict[str, float] | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{100 * value['mean']:.{digits}f} ± {100 * value['std']:.{digits}f}"


def where(result: dict[str, Any], name: str, seeds: int) -> str:
    p = result["provenance"]
    return (
        f"Mean ± standard deviation of {seeds} seeds; {p['processor']}, torch {p['torch']}, commit `{p['git']}`: "
        f"[{name}.json](../benchmarks/results/{name}.json)."
    )


def calibration(result: dict[str, Any]) -> str:
    """Balanced ECE of every network by every method, a table for every data set."""
    parts, seeds = [], 0
    for name, found in result["sets"].items():
        networks = found["summary"]
        seeds = len(found["seeds"])
        methods = list(next(iter(networks.values())))
        head = ["balanced ECE, %", *(_network(n) for n in networks), "its temperature"]
        rows = []
        for method in methods:
            told = [s["student"]["temperatures"].get(method) for s in found["seeds"].values()]
            T = "-" if None in told else f"{sum(told) / len(told):.2f}"
            rows.append([method, *(cell(networks[n][method]["balanced_ece"]) for n in networks), T])
        parts.append(f"**{SETS[name]}**\n\n{table(head, rows)}")
    for name, found in result["sets"].items():
        if "taught" in found:
            parts.append(f"**{SETS[name]}: students of the calibrated teacher**\n\n{_taught(found['taught'])}")
    note = "`oracle` is the temperature under which the test labels are likeliest, which no method may know."
    return "\n\n".join([*parts, f"{note} {where(result, 'calibration', seeds)}"])


def _taught(seeds: dict[str, Any]) -> str:
    rows = []
    for recipe, methods in next(iter(seeds.values())).items():
        for method, groups in methods.items():
            told = {g: [s[recipe][method][g] for s in seeds.values()] for g in groups}
            spread = [
                {"mean": statistics.mean(v), "std": statistics.stdev(v) if len(v) > 1 else 0.0} for v in told.values()
            ]
            teacher = "as it is" if method == "none" else f"by {method}"
            rows.append([f"{recipe}, teacher {teacher}", *(cell(v, 1) for v in spread)])
    groups = next(iter(next(iter(seeds.values())).values()))["none"]
    return table(["accuracy in %", *groups], rows)


def _network(name: str) -> str:
    return {"none": "student without teacher", "student": "student by krdistill"}.get(name, name)


def dlsa(name: str) -> Callable[[dict[str, Any]], str]:
    def write(result: dict[str, Any]) -> str:
        heads, balance = result["summary"]["heads"], result["summary"]["balance"]
        groups = list(next(iter(heads.values()))["groups"])
        rows = [
            [label, cell(row["top1"]), *(cell(row["groups"][g]) for g in groups), cell(row["ece"])]
            for label, row in heads.items()
        ]
        accuracy = table(["head, accuracy in %", "all", *groups, "ECE"], rows)
        divided = []
        for part, label in (("fit", "training rows"), ("test", "test rows")):
            before, after, there = (balance[part][k] for k in ("before", "after", "divided"))
            for key, words in (
                ("size_entropy", "entropy of the clusters' sizes, of 1"),
                ("purity", "share of a cluster's commonest class"),
                ("head_tail_ratio", "head to tail within a cluster"),
            ):
                divided.append([f"{words}, {label}", f"{before[key]['mean']:.2f}", f"{after[key]['mean']:.2f}"])
            words = f"head to tail: the whole, what stays at the first level, what is left; {label}"
            ratios = " / ".join(f"{there[k]['mean']:.1f}" for k in ("ratio_staying", "ratio_left"))
            divided.append([words, f"{before['undivided']['mean']:.1f}", ratios])
        spread = table(["balance of the clusters", "before fitting", "after"], divided)
        if "taught" in result["summary"]:
            taught = result["summary"]["taught"]
            lines = [[f"by {label}", *(cell(v) for v in row.values())] for label, row in taught.items()]
            spread += "\n\n" + table(["student, accuracy in %", *next(iter(taught.values()))], lines)
        val = next(iter(result["seeds"].values()))["val"]
        unseen = "a fifth of every class, which network and heads have never seen"
        chosen = f"Chosen on: {unseen if val.startswith('never') else val}."
        return f"{accuracy}\n\n{spread}\n\n{chosen} {where(result, name, len(result['seeds']))}"

    return write


def condense(result: dict[str, Any]) -> str:
    """Accuracies of students of small sets by labels, a table for every data set, and the gain by ADSA."""
    parts, seeds = [], 0
    for name, found in result["sets"].items():
        seeds = len(found["seeds"])
        groups = list(next(iter(next(iter(found["summary"].values())).values())))
        rows = []
        for row, labels in found["summary"].items():
            method, _, ipc = row.rpartition("-")
            place = f"{method}, {ipc} a class" if method else "the whole set"
            for key, values in labels.items():
                words = KINDS[key] if method else {"soft": "the teacher's"}.get(key, "hard labels")
                rows.append([f"{place}: {words}", *(cell(values[g], 1) for g in groups)])
        parts.append(f"**{SETS[name]}**\n\n{table(['accuracy in %', *groups], rows)}")
        gains = []
        for row, labels in found["summary"].items():
            if "adsa" in labels:
                each = [[s[row]["adsa"][g] - s[row]["soft"][g] for s in found["seeds"]] for g in groups]
                told = [f"{100 * sum(d) / len(d):+.1f} ({100 * min(d):+.1f} to {100 * max(d):+.1f})" for d in each]
                gains.append([row.replace("-", ", ") + " a class", *told])
        parts.append(table(["gain by ADSA, points: mean (least to most)", *groups], gains))
    return "\n\n".join([*parts, where(result, "condense", seeds)])


def quantised(result: dict[str, Any]) -> str:
    """What students lose as files, run by run, and how large the files are."""
    runs = result["runs"]
    names = [k for k in runs[0] if isinstance(runs[0][k], dict)]
    groups = [g for g, v in runs[0][names[0]]["before"]["groups"].items() if v is not None]
    rows = []
    for name in names:
        told = [[100 * (r[name]["after"]["top1"] - r[name]["before"]["top1"]) for r in runs]]
        for g in groups:
            told.append([100 * (r[name]["after"]["groups"][g] - r[name]["before"]["groups"][g]) for r in runs])
        size = sum(r[name]["bytes"] for r in runs) / len(runs) / 1024
        same = min(r[name]["agreement"] for r in runs)
        cells = [", ".join(f"{v:+.2f}" for v in each) for each in told]
        rows.append([name, f"{size:.1f}", f"{100 * same:.2f} %", *cells])
    p, first = result["provenance"], runs[0]
    words = (
        f"Points of accuracy by which the file differs from PyTorch, one figure for every seed; size in KiB; the least "
        f"share of test images that are answered alike. {first['model']} by {first['recipe']}, "
        f"{first[names[0]]['images']:,} test images, commit `{p['git']}`: "
        f"[quantised.json](../benchmarks/results/quantised.json)."
    )
    return f"{table(['file', 'KiB', 'same answer', 'all', *groups], rows)}\n\n{words}"


def crash(result: dict[str, Any]) -> str:
    """What the kills met and what came of it."""
    met = ", ".join(f"{n} in `{stage}`" for stage, n in result["by_stage"].items())
    wrong = len(result["runs_that_differ"])
    p = result["provenance"]
    return (
        f"{result['kills']} kills in {result['runs']} runs, commit `{p['git']}`, {p['processor']}, torch {p['torch']}: "
        f"{met}. **{wrong or 'None'} of the runs came to anything else** than the one that was never stopped."
    )


def fuzz(result: dict[str, Any]) -> str:
    """How many cases of what, and what failed."""
    tried = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in result["cases_per_target"].items())
    p = result["provenance"]
    return (
        f"{result['cases']:,} cases, commit `{p['git']}`, torch {p['torch']}, Hypothesis {result['hypothesis']}: "
        f"{tried}. **{sum(result['failures'].values()) or 'None'} failed.**"
    )


def mislabelled(result: dict[str, Any]) -> str:
    """Students of teachers that learned from partly wrong labels."""
    shares = result["shares"]
    names = list(next(iter(shares.values()))["summary"]["students"])
    ends = list(next(iter(shares.values()))["summary"]["teacher"])
    first, last = ends[0], ends[-1]
    rows = []
    for name in ("teacher", *names):
        cells = []
        for found in shares.values():
            row = found["summary"]["teacher"] if name == "teacher" else found["summary"]["students"][name]
            cells += [cell(row[first], 1), cell(row[last], 1)]
        rows.append([name, *cells])
    head = [f"{words}{float(share):.0%} wrong" for share in shares for words in ("all, ", f"{last}, ")]
    wrong = ", ".join(
        f"{100 * found['summary']['wrong']['mean over classes']['mean']:.0f} %" for found in shares.values()
    )
    note = (
        f"Digits as rows of numbers; accuracy in %, of all and of the rarest third. The teachers get {wrong} of the "
        "right training labels wrong, mean over the classes."
    )
    figures = table(["by share of the teacher's labels", *head], rows)
    return f"{figures}\n\n{note} {where(result, 'mislabelled', result['seeds'])}"


# Page to the sections that stand between its marks, each made from the results of its name.
PAGES: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "concepts": {"mislabelled": mislabelled},
    "howto-calibrate": {"calibration": calibration},
    "howto-dlsa": {name: dlsa(name) for name in ("dlsa-cifar100", "dlsa-tiny", "dlsa-banking77")},
    "howto-condense": {"condense": condense},
    "howto-device": {"quantised": quantised},
    "reliability": {"crash": crash, "fuzz": fuzz},
}


def updated(page: str, name: str) -> str:
    """The page with the figures put between the marks of every section whose results are there."""
    for section, write in PAGES[name].items():
        marks = re.compile(rf"(<!-- {section}:begin -->\n).*?(<!-- {section}:end -->)", re.S)
        if not marks.search(page):
            raise SystemExit(f"docs/{name}.md has no place for {section}")
        path = RESULTS / f"{section}.json"
        text = write(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "Not measured yet."
        page = marks.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page)  # type: ignore[misc]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page is not current")
    check = parser.parse_args().check
    for name in PAGES:
        path = DOCS / f"{name}.md"
        old = path.read_text(encoding="utf-8")
        new = updated(old, name)
        if check and new != old:
            sys.exit(f"docs/{name}.md does not show the committed results; run python benchmarks/systems.py")
        if not check:
            path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
