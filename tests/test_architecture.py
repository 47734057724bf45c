"""The house rules that a reader relies on, held by a test."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import krdistill

ROOT = Path(krdistill.__file__).parent
FLOORS = [
    {"priors", "anchors", "outputs", "rng", "files", "kinds", "events", "_checks", "_torchvision"},
    {"sampling", "distributed"},
    {"rectify", "calibration"},
    {"losses", "dlsa"},
    {"objective"},
    {"recipes"},
    {"models", "data", "evaluation"},
    {"bank"},
    {"training", "reporting", "deploy"},
    {"runfolder", "stages"},
    {"pipeline", "distiller", "calibrating", "answering", "costing", "reproduction"},
    {"study", "condense", "sharing"},
    {"console"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
ANYWHERE = {"errors", "config", "__init__"}


def _room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """Rooms of krdistill that a file imports while running (not for types alone)."""
    package = ["krdistill", *path.relative_to(ROOT).parts[:-1]]
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            if parts[:1] == ["krdistill"]:
                found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path: Path) -> None:
    room = _room(path)
    if room == "__init__":
        return
    level = {name: i for i, names in enumerate(FLOORS) for name in names}
    assert room in level or room in ANYWHERE, f"{room} stands on no floor; give it one here and in docs/architecture.md"
    for other in _imports(path) - {room, "__version__"}:
        if other in ANYWHERE:
            continue
        assert room not in ANYWHERE, f"{room} imports {other}, but may be imported from anywhere"
        assert level[other] < level[room], f"{room} imports {other}, which stands above or beside it"


def test_every_room_stands_in_the_architecture_page() -> None:
    page = (ROOT.parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in ROOT.iterdir():
        if path.name not in {"__pycache__", "__init__.py", "__main__.py", "py.typed"}:
            assert f"`{path.name}`" in page or f"`{path.name}/`" in page, f"{path.name} is not in docs/architecture.md"


@pytest.mark.parametrize("command", [["--help"], ["--version"], ["list"], ["run", "--help"]])
def test_light_commands_do_not_import_torch(command: list[str]) -> None:
    code = (
        "import sys\nfrom krdistill.cli import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("command", [["list"], ["run", "digits-lt"], ["compare", "study.yaml"]])
def test_on_a_device_without_the_other_packages_commands_name_what_installs_them(command: list[str]) -> None:
    code = (
        "import sys\nfor name in ('rich', 'pydantic', 'yaml', 'torch', 'onnx'):\n    sys.modules[name] = None\n"
        f"from krdistill.cli import main\nmain({command!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("error  ") and "pip install 'krdistill[train" in done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, krdistill; assert 'torch' not in sys.modules; krdistill.ClassPrior; assert 'torch' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_public_names_resolve() -> None:
    for name in krdistill.__all__:
        assert getattr(krdistill, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Distiler'"):
        krdistill.Distiler  # noqa: B018
