"""Collects a finished run into one JSON file under benchmarks/results.

    python benchmarks/collect.py runs/cifar100-lt [--name NAME]

What is kept: resolved configuration, provenance, split (checksum, counts, groups), metrics, diagnosis and the log.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).parent / "results"


def collect(run: Path) -> dict[str, Any]:
    """A finished run as one mapping."""

    def read(name: str) -> Any:
        return json.loads((run / name).read_text(encoding="utf-8"))

    export = run / "export.json"
    split = read("split.json")
    return {
        "config": yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")),
        "provenance": read("provenance.json"),
        "split": split,
        "metrics": read("metrics.json"),
        "diagnosis": read("teacher/diagnosis.json"),
        "export": read("export.json") if export.is_file() else None,
        "log": [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", help="file name without .json; by default the run's name and seed")
    arguments = parser.parse_args()
    result = collect(arguments.run)
    name = arguments.name or f"{result['config']['name']}-seed{result['config']['seed']}"
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
