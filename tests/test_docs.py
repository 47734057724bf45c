"""Generated pages are current, links lead somewhere, and the guide to a new method is followed word by word.

Commands and snippets of all other pages are done in tests/docs/test_pages.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

import krdistill
from krdistill.config import Classification, SecondStage
from krdistill.recipes import list_recipes
from krdistill.rectify import __all__ as RECTIFIERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOWTO = (ROOT / "docs" / "howto-add-a-method.md").read_text(encoding="utf-8")
SOURCE = Path(krdistill.__file__).parents[1]


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def _commands(text: str) -> list[str]:
    """Every command of the console blocks, without comments."""
    lines = "".join(_blocks(text, "console")).splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def _run(program: list[str], cwd: Path, *paths: Path, timeout: float = 240) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths or (SOURCE,)))
    done = subprocess.run([sys.executable, *program], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return done.stdout


# docs/methods.md -----------------------------------------------------------------------------------------------------


def test_the_page_of_methods_is_current(tmp_path: Path) -> None:
    _run([str(ROOT / "docs" / "generate_methods.py"), "--check"], tmp_path)


def test_a_page_that_is_not_current_is_told(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    script = shutil.copy(ROOT / "docs" / "generate_methods.py", tmp_path / "docs")
    _run([str(script)], tmp_path)
    page = tmp_path / "docs" / "methods.md"
    _run([str(script), "--check"], tmp_path)
    page.write_text(page.read_text(encoding="utf-8").replace("temperature", "warmth", 1), encoding="utf-8")
    with pytest.raises(AssertionError, match="not current"):
        _run([str(script), "--check"], tmp_path)


def test_the_page_names_every_method_with_formula_source_and_status() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##|\Z)", page, flags=re.M | re.S))
    statuses = re.findall(r"^- \*([^*]+)\*:", page, flags=re.M)
    assert len(statuses) == 4
    for recipe in list_recipes():
        part = parts[recipe.name]
        assert recipe.source.title in part and recipe.source.arxiv in part and recipe.defaults_from in part
        assert re.search(r"^- Status: (.*)$", part, flags=re.M).group(1) in statuses  # type: ignore[union-attr]
        assert "$$\n" in part or recipe.name == "none"
        for option in recipe.resolve({}).model_dump():
            assert f"`{option}=" in part, f"{option} of {recipe.name}"
    for name in (*get_args(Classification), *(set(RECTIFIERS) - {"errors", "correct_errors"})):
        assert "$$\n" in parts[name] and "- Status: " in parts[name], name
    for name in (*(f"Second stage {s}" for s in get_args(SecondStage)), "Sampler class-balanced", "correct_errors"):
        assert name in parts, name
    assert page.count("$$\n") % 2 == 0
    assert "KRDistill's equations are not public" in page and "LTKD's alpha, beta and T are unknown to us" in page
    assert not re.search(r":\w+:`|\.\. math|``[^`]", page), "Sphinx markup is left over"


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    text = path.read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)
    }
    prose = re.sub(r"^```.*?^```|^\$\$.*?^\$\$", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target


# docs/howto-add-a-method.md ------------------------------------------------------------------------------------------


_FOLLOWED = """
import json, runpy, shlex, sys
from pathlib import Path

import numpy as np
import pytest
import torch

import krdistill
from krdistill.cli import main
from krdistill.config import RecipeConfig
from krdistill.objective import ObjectiveContext
from krdistill.outputs import Outputs, Step
from krdistill.priors import ClassPrior
from krdistill.recipes import resolve_recipe

assert Path(krdistill.__file__).is_relative_to(Path.cwd()), krdistill.__file__
torch.set_num_threads(1)

recipe, options = resolve_recipe(RecipeConfig(name="js", temperature=2.0))
prior = ClassPrior.from_counts([50, 20, 5, 1])
objective = recipe.build(options, ObjectiveContext(prior=prior, groups=prior.groups("thirds"), student_dim=3))
z_s, z_t = np.random.default_rng(0).normal(size=(2, 6, 4)) * 3
labels = torch.tensor([0, 1, 2, 3, 0, 1])
said, told = (Outputs(torch.from_numpy(z), torch.zeros(6, 3)) for z in (z_s, z_t))
terms = objective(Step(said, labels, told)).terms


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


p, q = softmax(z_t / 2), softmax(z_s / 2)
m = (p + q) / 2
js = 2.0**2 / 2 * ((p * np.log(p / m)).sum(1) + (q * np.log(q / m)).sum(1))
np.testing.assert_allclose(terms["js"].numpy(), js, rtol=1e-10)
np.testing.assert_allclose(terms["classification"].numpy(), -np.log(softmax(z_s)[range(6), labels]), rtol=1e-10)

sys.argv = ["docs/generate_methods.py"]
runpy.run_path(sys.argv[0], run_name="__main__")

for command in json.loads(Path("commands.json").read_text()):
    program, *args = shlex.split(command)
    print("$", command, flush=True)
    if program == "pytest":
        assert pytest.main(["-q", "-p", "no:cacheprovider", *args]) == 0
    else:
        assert program == "krdistill", command
        main(args)
"""


def _follow(text: str, root: Path) -> list[str]:
    """Does what the document says to the files under ``root``; gives the files that it touched."""
    touched = []
    for file, old, new in re.findall(r"^In `([^`]+)`[^\n]*: `([^`]+)` becomes `([^`]+)`", text, flags=re.M):
        source = (root / file).read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{file}: {old!r} stands there {source.count(old)} times"
        (root / file).write_text(source.replace(old, new), encoding="utf-8")
        touched.append(file)
    for file, below, code in re.findall(
        r"^`([^`]+)`(?:, below `([^`]+)`)?:\n\n```python\n(.*?)^```", text, flags=re.M | re.S
    ):
        path = root / file
        if below:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            assert lines.count(f"{below}\n") == 1, f"{file}: {below!r}"
            lines.insert(lines.index(f"{below}\n") + 1, code)
            code = "".join(lines)
        else:
            assert not path.exists(), f"{file} is there already; the document needs another example"
        path.write_text(code, encoding="utf-8")
        touched.append(file)
    return touched


def test_following_the_howto_adds_a_method(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SOURCE / "krdistill", tmp_path / "src" / "krdistill", ignore=ignore)
    for file in ("docs/generate_methods.py", "tests/test_contract.py"):
        (tmp_path / file).parent.mkdir()
        shutil.copy(ROOT / file, tmp_path / file)
    touched = _follow(HOWTO, tmp_path)
    package = "src/krdistill"
    recipes = f"{package}/recipes"
    assert touched == [
        f"{recipes}/__init__.py", f"{package}/losses/js.py", f"{recipes}/js.py", f"{recipes}/__init__.py",
        "docs/generate_methods.py",
    ]  # fmt: skip
    assert len(touched) == len(_blocks(HOWTO, "python")) + 1, "a code block without its file's name"

    commands = _commands(HOWTO)
    assert any(c.startswith("pytest") for c in commands) and any("--dry-run" in c for c in commands)
    (tmp_path / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    shown = _run(["-c", _FOLLOWED], tmp_path, tmp_path / "src")
    assert "meet half-way" in shown and " passed" in shown
    page = (tmp_path / "docs" / "methods.md").read_text(encoding="utf-8")
    assert "### js\n" in page and "m = \\frac{p + q}{2}" in page and "2307.15190" in page
    metrics = json.loads((tmp_path / "runs" / "digits-lt" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["student"]["recipe"] == "js" and metrics["student"]["epochs"] == 2
    assert (tmp_path / "runs" / "digits-lt" / "report.html").is_file()
    assert not (tmp_path / "runs" / "digits-lt" / "student.onnx").exists()

    ruff = Path(sys.executable).with_name("ruff")
    if ruff.is_file():  # what a reader copies passes the project's own checks
        files = [str(tmp_path / f) for f in dict.fromkeys(touched)]
        for check in (["check"], ["format", "--check"]):
            done = subprocess.run(
                [str(ruff), *check, "--no-cache", "--config", str(ROOT / "pyproject.toml"), *files],
                capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout + done.stderr


# README.md -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(_blocks(README, "python"))))
def test_python_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    code = _blocks(README, "python")[number]
    if ".export(" in code:
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    _run(["-c", code], tmp_path)
    for made in re.findall(r"\.(?:save|export)\(\"([^\"]+)\"\)", code):
        assert (tmp_path / made).exists(), made
