"""Figures in the README come from committed files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path


def test_committed_results_are_what_the_readme_shows() -> None:
    root = Path(__file__).parents[1]
    result = json.loads((root / "benchmarks" / "results" / "cifar100-lt-seed0.json").read_text(encoding="utf-8"))
    spec = importlib.util.spec_from_file_location("readme", root / "benchmarks" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert module.updated(readme, module.section(result)) == readme
    demo = json.loads((root / "benchmarks" / "results" / "demo-seed0.json").read_text(encoding="utf-8"))
    seconds = sum(demo["provenance"]["seconds"].values())
    assert f"export took {seconds:.0f} s on two cores" in " ".join(readme.split())
    assert not (result["provenance"]["git"] or "-dirty").endswith("-dirty"), "measure from a committed state"
