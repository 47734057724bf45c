"""CIFAR-100-LT as the field cuts it, by configuration: a run folder with checkpoints, metrics and a report.

`python examples/cifar_lt.py --train.epochs 30` with `KRDISTILL_DATA` naming the folder of CIFAR-100; any key of the
configuration may follow. The preset's settings are for two cores; they are not a paper's.
"""

import json
import sys
from pathlib import Path

from krdistill import load_config
from krdistill.pipeline import prepare, run

words = sys.argv[1:]
overrides = [(key.removeprefix("--"), value) for key, value in zip(words[::2], words[1::2], strict=True)]
config = load_config("cifar100-lt", [("recipe", "krdistill"), *overrides])
print(f"{config.data.source}, {config.data.profile} cut, imbalance factor {config.data.imbalance_factor:g}")
folder = Path("runs") / config.name
run(prepare(config), folder)  # the same command goes on where it stopped

metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
rows = {"teacher": metrics["teacher"], **metrics["baselines"], "student": metrics["student"]}
for name, row in rows.items():
    groups = ", ".join(f"{g} {100 * v['accuracy']:.1f}" for g, v in row["groups"].items() if v["accuracy"] is not None)
    print(f"{name} ({row['model']}): {groups}; last epoch, on {row['images']:,} test images")
for name, row in rows.items():
    print(f"{name}: balanced accuracy {row['balanced_accuracy']:.4f}")
