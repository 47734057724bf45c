"""When correcting the teacher's errors pays: teachers that learned from partly wrong labels, students from right ones.

    python benchmarks/mislabelled.py [--seeds N] [--json PATH]

The long-tailed digits as rows of numbers (preset ``features-lt``). A share of the teacher's training labels is wrong:
each of them is drawn anew from the other classes, evenly, so that most rows of a rare class may be wrong ones. Students
see the right labels, and the teacher's answers as they are corrected by nothing, ``lift`` or ``swap``
(:mod:`krdistill.rectify.error_correction`), beside KD and a student without teacher. The re-fitted classifier of
``krdistill`` is fitted to the student's labels, so it corrects the teacher by itself.

``wrong`` is the share of the right training labels that the teacher, as it is, gets wrong, by group of classes.
The file is written from a clean source tree alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krdistill.config import load_config
from krdistill.pipeline import prepare, run, run_teacher
from krdistill.rng import generator
from krdistill.runfolder import environment
from krdistill.stages import measure

SHARES = (0.0, 0.2, 0.4)
COMMON = [
    ("train.evaluate_every", "30"),
    ("student.train.sampler", "instance"),  # nothing but the labels is to differ
    ("export.onnx", "false"),
    ("baselines", "[]"),
    ("bank.views", "0"),
]
METHODS: dict[str, list[tuple[str, str]]] = {
    "none": [("recipe", "none")],
    "kd": [("recipe", "kd")],
    **{
        f"{recipe}, correction {c}": [("recipe", recipe), ("recipe.correction", c)]
        for recipe in ("kd-balanced", "krdistill-lrd", "krdistill")
        for c in ("none", "lift", "swap")
    },
}


def mislabel(labels: Tensor, num_classes: int, share: float, seed: int) -> Tensor:
    """Labels of which a share, in every class, are drawn anew from the other classes.

    Args:
        labels: shape ``(N,)``.
        num_classes: K.
        share: of every class's rows, rounded down.
        seed: of the draw.
    """
    made, draw = labels.clone(), generator(seed, "mislabelled")
    for k in range(num_classes):
        rows = (labels == k).nonzero().flatten()
        chosen = rows[torch.randperm(len(rows), generator=draw)[: int(share * len(rows))]]
        other = torch.randint(num_classes - 1, (len(chosen),), generator=draw)
        made[chosen] = other + (other >= k).long()
    return made


def one(share: float, seed: int, place: Path) -> dict[str, Any]:
    """A teacher of so many wrong labels, and every student of it."""
    given = [*COMMON, ("seed", str(seed))]
    plan = prepare(load_config("features-lt", given))
    train, K = plan.data.train, plan.data.train.num_classes
    noisy = replace(plan.data, train=replace(train, labels=mislabel(train.labels, K, share, seed)), split={})
    prior, groups = measure(noisy, plan.config.data.groups)
    known = run_teacher(replace(plan, data=noisy, prior=prior, groups=groups), place / "teacher")["teacher"]
    found: dict[str, Any] = {"teacher": _accuracies(known), "students": {}}
    for name, options in METHODS.items():
        config = load_config("features-lt", [*given, *options, ("teacher.run", str(place / "teacher"))])
        folder = place / name.replace(", ", "-").replace(" ", "-")
        found["students"][name] = _accuracies(run(prepare(config), folder, report=False)["student"])
        diagnosis = json.loads((folder / "teacher" / "diagnosis.json").read_text("utf-8"))
    wrong = {n: e for n, e in diagnosis["training"]["groups"].items() if e is not None}
    counts = {n: groups.sizes()[n] for n in wrong}
    found["wrong"] = {"mean over classes": sum(wrong[n] * counts[n] for n in wrong) / sum(counts.values()), **wrong}
    return found


def _accuracies(row: dict[str, Any]) -> dict[str, float]:
    return {"all": row["top1"], **{n: g["accuracy"] for n, g in row["groups"].items() if g["classes"]}}


def spread(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every figure over the seeds."""
    return {
        k: {
            "mean": statistics.mean(r[k] for r in rows),
            "std": statistics.stdev(r[k] for r in rows) if len(rows) > 1 else 0.0,
        }
        for k in rows[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    provenance = environment(torch.device("cpu"))
    if arguments.json and str(provenance["git"] or "").endswith("-dirty"):
        parser.error("the source has changes that no commit holds; commit them first, or leave --json out")
    kept: dict[str, Any] = {"provenance": provenance, "seeds": arguments.seeds, "shares": {}}
    for share in SHARES:
        seeds = []
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as place:
                seeds.append(one(share, seed, Path(place)))
        summary: dict[str, Any] = {
            "teacher": spread([s["teacher"] for s in seeds]),
            "wrong": spread([s["wrong"] for s in seeds]),
            "students": {m: spread([s["students"][m] for s in seeds]) for m in METHODS},
        }
        kept["shares"][f"{share:g}"] = {"summary": summary, "seeds": seeds}
        print(f"\n{share:.0%} of the teacher's labels wrong")
        for name, row in {"teacher": summary["teacher"], "wrong": summary["wrong"], **summary["students"]}.items():
            print(
                f"{name:<36}"
                + "".join(f"{k} {100 * v['mean']:6.2f} ± {100 * v['std']:5.2f}   " for k, v in row.items())
            )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
