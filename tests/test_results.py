"""Figures in the README come from committed files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_results_are_what_the_readme_shows() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "cifar100-lt-seed0.json").read_text(encoding="utf-8"))
    module = _script("readme")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.updated(readme, module.section(result)) == readme
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo-seed0.json").read_text(encoding="utf-8"))
    seconds = sum(demo["provenance"]["seconds"].values())
    assert f"export took {seconds:.0f} s on two cores" in " ".join(readme.split())
    assert not (result["provenance"]["git"] or "-dirty").endswith("-dirty"), "measure from a committed state"


def test_committed_figures_are_what_the_performance_page_shows() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert _script("performance").updated(page) == page
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        commit = json.loads(path.read_text(encoding="utf-8"))["provenance"].get("git") or ""
        assert not commit.endswith("-dirty"), f"{path.name}: measure from a committed state"
