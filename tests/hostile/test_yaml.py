"""Configurations and study files of strangers: no object is made, and no memory is filled."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from krdistill.config import load_config, parse_yaml
from krdistill.errors import ConfigError, RunFolderError
from krdistill.runfolder import RunFolder
from krdistill.study.plan import read_study


def _laughs(levels: int) -> str:
    """Ten of ten of ten ..., in a few hundred characters."""
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: !!python/object/apply:os.system ['touch sprung']", "tag"),
        ("name: !!python/object/new:subprocess.Popen [[touch, sprung]]", "tag"),
        ("name: !!python/name:os.system", "tag"),
        ("!!python/module:this.that {}", "tag"),
        ("name: !own {}", "tag"),
        ("name: !!binary gIA=", "tag"),
        ("name: !!set {a, b}", "tag"),
        ("name: 2001-12-14", "quotation marks"),
        ("name: 2001-99-99", "quotation marks"),
        ("name: !!float x", "not valid YAML"),
        ("name: !!int ''", "not valid YAML"),
        ("name: !!bool x", "not valid YAML"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        (_laughs(9), "100,000 values"),
        ("recipe: {name: kd}\nrecipe2: &a [*a]", "what it is in"),
        ("a: &a {b: {c: *a}}", "what it is in"),
        ("a: &a {<<: *a}", "what it is in"),
        ("[" * 20_000, "nested too deeply"),
        ("a: " * 20_000, "not valid YAML"),
        ("{" * 20_000, "nested too deeply"),
        ("- " * 20_000, "nested too deeply"),
        ("x" * 2**21, "characters"),
        ("\x07", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("? [a]\n: b", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_of_strangers(text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=said):
        load_config("./config.yaml")
    with pytest.raises(ConfigError):
        read_study(Path("config.yaml"))
    Path("run").mkdir()
    Path("run/config.yaml").write_text(text)
    with pytest.raises(RunFolderError, match="damaged"):
        RunFolder(Path("run"), load_config({}))
    assert time.process_time() - started < 20
    assert not Path("sprung").exists()


def test_aliases_that_stand_for_little_are_taken() -> None:
    text = "a: &a {x: 1, y: [2, 3]}\nb: *a\nc: {<<: *a, x: 5}\nd: [*a, *a]"
    a = {"x": 1, "y": [2, 3]}
    assert parse_yaml(text, "it") == {"a": a, "b": a, "c": {**a, "x": 5}, "d": [a, a]}
    assert parse_yaml("", "it") is None and parse_yaml("# nothing", "it") is None


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"name: \xff\xfe")
    for load in (lambda: load_config(str(path)), lambda: read_study(path)):
        with pytest.raises(ConfigError, match="UTF-8"):
            load()


def test_values_of_the_command_line_that_are_no_yaml_are_texts() -> None:
    assert load_config({}, [("data.source", "!!python/name:os.system")]).data.source == "!!python/name:os.system"
    assert load_config({}, [("name", "2026-11-21")]).name == "2026-11-21"


def test_an_empty_recipe_gives_way_to_the_command_line() -> None:
    assert load_config({"recipe": None}, [("recipe", "none")]).recipe.name == "none"
