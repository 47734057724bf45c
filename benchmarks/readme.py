"""Writes the README's results from the committed JSON files, or checks that they are current.

python benchmarks/readme.py [--check]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = "cifar100-lt-seed0"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def _row(name: str, m: dict[str, Any]) -> str:
    def percent(value: float | None) -> str:
        return "n/a" if value is None else f"{100 * value:.1f}"

    groups = [percent(g["accuracy"]) for g in m["groups"].values()]
    best = (
        f"{percent(m['best']['top1'])} (epoch {m['best']['epoch']}, chosen on {m['best']['chosen_on']})"
        if m["best"]
        else "-"
    )
    cells = [name, m["model"], *groups, percent(m["top1"]), percent(m["balanced_accuracy"]), percent(m["ece"]), best]
    return "| " + " | ".join(cells) + " |"


def section(result: dict[str, Any]) -> str:
    """The README's results section for a collected run."""
    config, provenance, metrics = result["config"], result["provenance"], result["metrics"]
    threads = f"{provenance['threads']} thread{'s' if provenance['threads'] > 1 else ''}"
    groups = list(metrics["teacher"]["groups"])
    head = ["", "network", *groups, "all", "balanced", "ECE", "best epoch"]
    rows = [
        _row("teacher", metrics["teacher"]),
        _row(f"teacher, {metrics['teacher_rectified']['recipe']}", metrics["teacher_rectified"]),
        *(_row(f"student, {name}", m) for name, m in metrics["baselines"].items()),
        _row(f"**student, {metrics['student']['recipe']}**", metrics["student"]),
    ]
    train = config["student"]["train"]
    text = (
        f"CIFAR-100-LT, imbalance factor {config['data']['imbalance_factor']:g}, "
        f"{result['split']['train_images']:,} training images; teacher {config['teacher']['train']['epochs']} epochs, "
        f"students {train['epochs']} epochs, batch {train['batch_size']}, {train['augmentation']}; "
        f"one seed ({config['seed']}), accuracy in percent, last epoch. Measured on {provenance['processor']}, "
        f"{threads}, torch {provenance['torch']}, commit "
        f"`{provenance['git']}`: [{RESULT}.json](benchmarks/results/{RESULT}.json)."
    )
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "--:|" * (len(head) - 3) + "---|", *rows]
    return "\n".join([text, "", *table])


def updated(readme: str, text: str) -> str:
    """The README with the results put between their marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is not current")
    check = parser.parse_args().check
    result = json.loads((ROOT / "benchmarks" / "results" / f"{RESULT}.json").read_text(encoding="utf-8"))
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = updated(old, section(result))
    if check and new != old:
        sys.exit("README.md does not show the committed results; run python benchmarks/readme.py")
    if not check:
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
