"""Every command and every snippet of README, CONTRIBUTING and docs/ is done here, page by page, in a small world.

The world holds what the pages speak of: a finished run, photos, tables, an exported file. Training is shortened and
CIFAR is replaced by scikit-learn's digits (``_shortened``). What is not run has its reason in ``NOT_RUN``; its words
are checked as far as they go. docs/howto-add-a-method.md is followed word by word in tests/test_docs.py.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from krdistill import load_data, load_network
from krdistill.calibration import fit_calibrator
from krdistill.cli import app, main
from krdistill.config import RunConfig, list_presets, load_config
from krdistill.deploy import export_onnx
from krdistill.pipeline import prepare, run
from krdistill.recipes import resolve_recipe
from krdistill.sharing import share_run

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FOLLOWED = "docs/howto-add-a-method.md"
PROGRAMS = ("krdistill", "make", "pip", "python", "torchrun", "find", "echo")

# Command (its beginning): why it is not run here. Its words are checked all the same.
NOT_RUN = {
    "make": "it installs, tests or trains for minutes; its target must be there",
    "pip": "it fetches packages; its extras must be declared",
    "torchrun": "tests/test_many_processes.py runs krdistill under torchrun; the run's own words are resolved",
    "krdistill condense cifar100-lt": "it makes a thousand images; tests/condense makes fewer",
    "krdistill compare": "the study of a page is an hour of training; all of it is planned (--dry-run)",
    "krdistill bench-device student.onnx --json": "the measurement before it, printed in another form",
    "krdistill run banking77-lt": "sentences and encoder come from elsewhere; tests/test_text_run.py runs others",
    "krdistill predict questions.onnx": "tests/test_text_run.py asks a student for sentences",
    "krdistill predict rows.onnx": "tests/test_text_run.py asks a student for rows of numbers",
    "python benchmarks/": "it measures for minutes, some on a GPU; the script and its options must be there",
}
# Page: what stands before its snippets; the reader has it, and the page says so.
GIVEN = {
    "docs/howto-calibrate.md": """
from krdistill import load_data
_data = load_data("digits")
logits, labels, images = _logits(_data), _data.train.labels, _data.test.images[:3].numpy()
other_logits = logits[:5]
""",
    "docs/howto-bank.md": """
from krdistill import load_data
_data = load_data("digits")
ids, class_names = list(_data.train.ids), list(_data.class_names)
logits = _logits(_data)
""",
}
# Snippet (a part of it): why it is compiled only.
NOT_EXECUTED = {
    "checkpoints/student-nonfinite.pt": "it looks into a training that failed; tests/training/ makes one and does this",
}
SHORTENED = {'.fit("cifar100")': '.fit("digits")', 'student="resnet8",': 'student="mlp16", train={"epochs": 1},'}


def _fences(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.M | re.S)


def _commands(text: str) -> list[str]:
    """Commands of fenced and of indented blocks; a line that ends in a backslash goes on."""
    fenced = "".join(code for language, code in _fences(text) if language in ("console", "bash", "sh"))
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    indented = [line.strip() for line in rest.splitlines() if line.startswith("    ")]
    lines = [*fenced.replace("\\\n", " ").splitlines(), *(i for i in indented if i.split()[0] in PROGRAMS)]
    found = (shlex.split(line, comments=True) for line in lines)
    return [shlex.join(words).replace("'|'", "|") for words in found if words]


def _reason(command: str) -> str | None:
    last = command.rpartition("| ")[2]
    return next((why for start, why in NOT_RUN.items() if last.startswith(start)), None)


# The world ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the commands of the pages find what they speak of."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    place = tmp_path_factory.mktemp("world")
    small = {
        "name": "digits-lt",
        "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "groups": "thirds"},
        "teacher": {"model": "mlp32"},
        "student": {"model": "mlp16"},
        "train": {"epochs": 3, "augmentation": "crop-only"},
        "recipe": "kd-balanced",
    }
    run(prepare(load_config(small, [])), place / "runs" / "digits-lt", report=False)
    for name in ("cifar100-lt", "demo"):
        (place / "runs" / name).symlink_to("digits-lt")
    shutil.copy(place / "runs" / "digits-lt" / "student.onnx", place / "teacher.onnx")
    sure = fit_calibrator("temperature", 3 * _logits(load_data("digits")), load_data("digits").train.labels)
    student = load_network(place / "runs" / "digits-lt" / "student")
    export_onnx(student, place / "student.onnx", class_counts=range(1, 11), calibrator=sure)
    share_run(place / "runs" / "digits-lt", place / "shared" / "given")
    (place / "shared" / "digits").symlink_to("given")  # until a page writes it
    _photos(place / "photos")
    shutil.copytree(place / "photos", place / "my-images")
    shutil.copy(place / "photos" / "train" / "cat" / "0.jpg", place / "photo.jpg")
    paths = sorted(str(p.relative_to(place)) for p in (place / "photos").rglob("*.jpg"))
    (place / "list.txt").write_text("\n".join(paths) + "\n", encoding="utf-8")
    (place / "table.csv").write_text("path\n" + "\n".join(paths) + "\n", encoding="utf-8")
    rows = [f"{Path(p).relative_to('photos')},{Path(p).parts[2]},{Path(p).parts[1]}" for p in paths]
    (place / "labels.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n", encoding="utf-8")
    questions = "where is my card,card\nI lost it,lost\n" * 40
    (place / "questions.csv").write_text(f"text,label\n{questions}", encoding="utf-8")
    weights = "".join(f"{k},{k + 1}\n" for k in range(10))
    (place / "frequencies.csv").write_text(f"class,weight\n{weights}", encoding="utf-8")
    data = load_data("digits")
    np.savez(place / "answers.npz", ids=list(data.train.ids), logits=_logits(data), class_names=list(data.class_names))
    study = next(code for language, code in _fences(PAGES["docs/howto-compare.md"]) if language == "yaml")
    (place / "study.yaml").write_text(study, encoding="utf-8")
    (place / "benchmarks").symlink_to(ROOT / "benchmarks")
    factory = next(code for _, code in _fences(PAGES["docs/howto-model.md"]) if "def small(" in code)
    (place / "mynets.py").write_text(factory, encoding="utf-8")
    factory = next(code for _, code in _fences(PAGES["docs/howto-text.md"]) if "class Letters(" in code)
    (place / "mytexts.py").write_text(factory, encoding="utf-8")
    return place


def _logits(data: Any) -> np.ndarray:
    """What a good teacher that cannot be asked has said."""
    noise = np.random.default_rng(0).normal(size=(len(data.train), data.num_classes))
    return np.asarray(4 * np.eye(data.num_classes)[data.train.labels.numpy()] + noise, np.float32)


def _photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, count in (("cat", 12), ("dog", 6), ("owl", 4)):
        for split, n in (("train", count), ("test", 3)):
            (folder / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")


# Commands -------------------------------------------------------------------------------------------------------------


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    """Options of a run as its configuration has them."""
    own = {"--out", "--dry-run", "--report", "--no-report"}
    pairs = list(zip(words[::2], words[1::2], strict=True))
    return [(k[2:], v) for k, v in pairs if k not in own]


def _checked(words: list[str]) -> None:
    """The words of a krdistill command, by its own parser and, of a run, by its configuration."""
    found: click.Command = app
    context = click.Context(app, info_name="krdistill")
    while isinstance(found, click.Group):
        name, *words = words
        assert name in found.commands, f"no command {name!r}"
        found = found.commands[name]
    context = found.make_context(found.name, list(words), parent=context)
    if found.name == "run":
        config = load_config(words[0], _pairs(words[1:]))
        resolve_recipe(config.recipe)


def _shortened(words: list[str], out: Path) -> list[str]:
    """The same command, so that it ends in seconds."""
    if words[0] == "export":
        return [*words, "--max-drop", "100", "--max-rare-drop", "100"]  # three epochs are no network to judge by
    if words[0] != "run":
        return words
    given = dict(_pairs(words[2:]))
    more = {"train.epochs": "1", "export.onnx": "false", "train.augmentation": "none"}
    if "baselines" not in given:
        more["baselines"] = "[]"
    more |= {f"{who}.model": "mlp16" for who in ("teacher", "student") if f"{who}.model" not in given}
    if any(key in given for key in ("teacher.run", "teacher.file", "teacher.answers")):
        more.pop("teacher.model", None)
    if words[1].startswith(("cifar", "tiny")):
        more |= {"data.source": "digits", "data.profile": "none", "data.imbalance_factor": "1", "data.groups": "thirds"}
    if "data.image_size" in given or words[1] == "folder":
        more["data.image_size"] = "16"
    given |= more
    named = [words[i + 1] for i, word in enumerate(words) if word == "--out"]
    return ["run", words[1], *(w for k, v in given.items() for w in (f"--{k}", v)), "--out", *(named or [str(out)])]


def _not_run(words: list[str], world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program, *args = words[words.index("|") + 1 :] if "|" in words else words
    if program == "torchrun":
        _checked(args[args.index("krdistill") + 1 :])
    elif program == "krdistill":
        _checked(args)
        if args[0] == "compare":
            study = [str(ROOT / a) if (ROOT / a).is_file() and a.endswith(".yaml") else a for a in args]
            main([*study, "--dry-run"])
            assert "cells" in capsys.readouterr().out
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        assert len(args) == 1 and args[0] in targets
    elif program == "pip":
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        extras = re.fullmatch(r"(?:krdistill|\.)\[([a-z,]+)\]", args[-1])
        assert args[0] == "install" and extras
        for extra in extras[1].split(","):
            assert re.search(rf"^{extra} = \[", declared, flags=re.M), f"no extra {extra!r}"
    elif program == "python":
        text = (ROOT / args[0]).read_text(encoding="utf-8")
        for option in (a for a in args if a.startswith("--")):
            assert f'"{option}"' in text, f"{args[0]} has no {option}"
    else:
        pytest.fail(f"no check for {shlex.join(words)!r}")


@pytest.mark.xdist_group("pages")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [p for p in PAGES if p != FOLLOWED and _commands(PAGES[p])])
def test_the_commands_of_a_page(
    page: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.syspath_prepend(str(world))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for number, command in enumerate(_commands(PAGES[page])):
        words = shlex.split(command)
        if words[:2] == ["krdistill", "share"]:
            place = world / words[3]
            place.unlink() if place.is_symlink() else shutil.rmtree(place, ignore_errors=True)
        print(f"$ {command}")
        if _reason(command) is not None:
            _not_run(words, world, capsys)
            continue
        if "|" in words:
            at = words.index("|")
            fed = subprocess.run(words[:at], capture_output=True, check=True, timeout=60).stdout
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(fed)))
            words = words[at + 1 :]
        assert words[0] == "krdistill", f"no way to run {command!r}; say why in NOT_RUN"
        _checked(words[1:])
        if "weights=pretrained" in command:  # they are fetched
            continue
        capsys.readouterr()
        main(_shortened(words[1:], tmp_path / str(number)))
        shown = capsys.readouterr()
        assert (shown.out + shown.err).strip() or "--out" in words, f"{command} says nothing"
        made = [word for option, word in pairwise(words) if option == "--out"]
        assert all((world / name).exists() for name in made)


def test_every_reason_is_needed() -> None:
    said = [c for page in PAGES if page != FOLLOWED for c in _commands(PAGES[page])]
    for start in NOT_RUN:
        assert any(c.startswith(start) for c in said), start


# Snippets -------------------------------------------------------------------------------------------------------------


_SNIPPETS = [
    (page, number)
    for page, text in PAGES.items()
    if page not in (FOLLOWED, "README.md")  # tests/test_docs.py runs these
    for number, (language, _) in enumerate(_fences(text))
    if language == "python"
]


@pytest.mark.xdist_group("pages")
@pytest.mark.parametrize(("page", "number"), _SNIPPETS)
def test_a_snippet_runs(page: str, number: int, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = _fences(PAGES[page])[number][1]
    compiled = compile(code, f"{page}[{number}]", "exec")
    if any(part in code for part in NOT_EXECUTED):
        return
    if "HubNetwork" in code:
        pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(world)
    if any(old in code for old in SHORTENED) and page == "docs/howto-bank.md":
        for old, new in SHORTENED.items():
            code = code.replace(old, new)
        compiled = compile(code, f"{page}[{number}]", "exec")
    names: dict[str, Any] = {"__name__": "snippet", "_logits": _logits}
    with torch.random.fork_rng():
        exec(GIVEN.get(page, ""), names)
        exec(compiled, names)


def test_fences_are_of_known_languages() -> None:
    for page, text in PAGES.items():
        languages = {language for language, _ in _fences(text)}
        assert languages <= {"console", "python", "yaml"}, f"{page}: {languages}"
        assert text.count("```") % 2 == 0, page


def test_study_files_of_the_pages_are_yaml() -> None:
    blocks = [code for text in PAGES.values() for language, code in _fences(text) if language == "yaml"]
    assert blocks and all(isinstance(yaml.safe_load(code), dict) for code in blocks)


# Words within the text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_commands_within_the_text_exist(page: str) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.M | re.S)
    for command in re.findall(r"(?<!`)`(krdistill [^`]+)`(?!`)", prose):
        words = shlex.split(command)[1:]
        found: Any = app
        while words and isinstance(found, click.Group) and not words[0].startswith("-"):
            assert words[0] in found.commands, f"{page}: {command}"
            found, words = found.commands[words[0]], words[1:]
        options = {o for p in found.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}
        for word in (w.partition("=")[0] for w in words if w.startswith("--")):
            assert "." in word or word in options or found.name == "run", f"{page}: {command} has no {word}"


def _has(key: str) -> bool:
    model: Any = RunConfig
    parts = key.split(".")
    if parts[0] == "recipe":
        return True
    if parts[0] == "train":
        parts = ["student", *parts]
    for part in parts:
        if part not in getattr(model, "model_fields", {}):
            return False
        kind = model.model_fields[part].annotation
        model = next((a for a in (kind, *get_args(kind)) if hasattr(a, "model_fields")), None)
    return True


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_the_configuration_exist(page: str) -> None:
    text = PAGES[page]
    keys = set(re.findall(r"--((?:data|teacher|student|train|recipe|bank|export)\.[a-z_.]+[a-z_])", text))
    keys |= set(re.findall(r"`((?:data|teacher|student|train|bank|export)\.[a-z_.]+[a-z_])`", text))
    keys = {k for k in keys if not k.endswith((".py", ".npz", ".csv", ".onnx", ".json", ".md"))}
    assert [k for k in sorted(keys) if not _has(k)] == []


def test_presets_of_the_pages_exist() -> None:
    named = {w for text in PAGES.values() for w in re.findall(r"krdistill run ([a-z0-9][a-z0-9-]*)", text)}
    assert named and named <= set(list_presets()), named - set(list_presets())


# The site -------------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    pages = {str(p.relative_to(tmp_path)): p.read_text(encoding="utf-8") for p in tmp_path.rglob("*.html")}
    for page in PAGES:
        if page.startswith("docs/"):
            assert page.removeprefix("docs/").replace(".md", ".html") in pages, page
    for name, text in pages.items():
        fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert not [f for f in fetched if "canonical" not in f], f"{name} fetches {fetched}"
        if name != "howto-add-a-method.html":
            assert not re.search(r":(?:func|class|meth|math):", text), f"{name} shows Sphinx markup"
        assert "arithmatex" not in text, f"{name} has a formula that is not shown"
    assert pages["methods.html"].count("<math") > 50
    for name in ("kd_divergence", "LogitRectifiedDistillation"):
        assert f'id="krdistill.losses.{name}"' in pages["api/losses.html"]
    assert 'id="krdistill.Distiller' in pages["api/main.html"]
    assert (tmp_path / "repository" / "benchmarks" / "results" / "step.json").is_file()
