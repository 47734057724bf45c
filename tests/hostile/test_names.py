"""Names that strangers chose, of classes and files: they command no terminal, no page and no spreadsheet."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from krdistill.commands.shared import make_console
from krdistill.console import print_facts, print_list, print_table
from krdistill.deploy.predicting import Prediction, write_predictions

ESCAPES = [
    "\x1b[2J\x1b[1;1H",  # clears the screen
    "\x1b]0;owned\x07",  # sets the window's title
    "\x1b]52;c;Y3VybA==\x07",  # sets the clipboard
    "\x9b31m",  # the same, in one character
    "a\rb", "a\bb", "\x7f", "\u202egnp.exe", "\u2066x\u2069", "\u2028", "\udcff", "\x00",
]  # fmt: skip
HTML = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'onmouseover='alert(1)",
    "</style><script>",
    "&lt;b&gt;",
]
FORMULAS = ["'=1", "=cmd|' /C calc'!A0", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1", "\uff1d1+1"]
OTHERS = ["$x^{$", "$\\frac{$", "[bold]x[/bold]", "[/]", "{{ 7 * 7 }}", "{% raw %}", 'a,b"c', "../../x"]
ALL = [*ESCAPES, *HTML, *FORMULAS, *OTHERS]


def _is_plain(text: str) -> bool:
    """Whether no character commands anything, but for the end of a line."""
    turning = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
    return all(
        c == "\n" or (unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") and ord(c) not in turning) for c in text
    )


@pytest.mark.parametrize("name", ALL)
def test_the_terminal(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from krdistill.commands.shared import print_error

    console = make_console()
    print_table(console, [name, "n"], [[name, "1"], ["plain", "2"]])
    print_facts(console, [("data", f"{name}: 5 images")])
    print_list(console, "names", [(name, name, name)])
    console.print(name, markup=False)
    print_error(f"no class {name}")
    out, err = capsys.readouterr()
    assert _is_plain(out) and _is_plain(err)
    assert "plain" in out and "no class" in err
    if name == "[bold]x[/bold]":
        assert out.count(name) >= 4


def test_colours_are_still_there_on_a_terminal() -> None:
    from krdistill.console import PlainConsole

    stream = io.StringIO()
    console = PlainConsole(file=stream, force_terminal=True, color_system="standard", highlight=False)
    console.print("[bold red]error[/bold red]  \x1b[2Jx")
    assert stream.getvalue() == "\x1b[1;31merror\x1b[0m  \ufffd[2Jx\n"


def test_the_whole_command_line_with_names_of_a_folder(tmp_path: Path, call: Callable[..., int], capfd: Any) -> None:
    """Names that a file system takes, in every command that reads a folder."""
    names = [n for n in ALL if "/" not in n and "\x00" not in n][:14]
    rng = np.random.default_rng(0)
    for k, name in enumerate(names):
        place = os.path.join(os.fsencode(tmp_path / "photos"), os.fsencode(name) if name == "\udcff" else name.encode())
        os.makedirs(place)
        for i in range(4):
            stream = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(stream, "PNG")
            with open(
                os.path.join(place, f"{i}".encode() + name.encode("utf-8", "surrogateescape") + b".png"), "wb"
            ) as f:
                f.write(stream.getvalue() if i or k else b"no image")
    assert call("inspect", str(tmp_path / "photos")) in (0, 2)
    assert call("inspect", str(tmp_path / "photos"), "--data.on_unreadable", "skip") in (0, 2)
    assert call("run", "digits-lt", "--data.source", str(tmp_path / "photos"), "--data.profile", "none", "--dry-run",
                "--data.imbalance_factor", "1", "--out", str(tmp_path / "a\x1b[2Jb")) == 2  # fmt: skip
    assert call("run", "digits-lt", "--data.source", str(tmp_path / "photos"), "--data.on_unreadable", "skip",
                "--data.imbalance_factor", "1", "--data.profile", "none", "--dry-run", "--teacher.model", "resnet20",
                "--student.model", "resnet8", "--out", str(tmp_path / "a\x1b[2Jb")) == 0  # fmt: skip
    out, err = capfd.readouterr()
    assert "photos" in out and _is_plain(out) and _is_plain(err)


@pytest.mark.parametrize("given", [ALL])
def test_the_report_and_show(
    given: list[str], tiny_run: Path, tmp_path: Path, call: Callable[..., int], capfd: Any
) -> None:
    from html.parser import HTMLParser

    names = [n for n in given if n != "\udcff"]
    for start in range(0, len(names), 10):
        ten = (names[start:] + names)[:10]
        folder = shutil.copytree(tiny_run, tmp_path / f"run-{start}")
        old = json.loads((folder / "split.json").read_text())["class_names"]
        for path in (p for p in folder.rglob("*.json") if p.name != "done.json"):
            value = _renamed(json.loads(path.read_text()), dict(zip(old, ten, strict=True)))
            path.write_text(json.dumps(value))
        assert call("report", str(folder)) == 0
        assert call("show", str(folder)) == 0
        page = (folder / "report.html").read_text()
        tags: set[str] = set()
        handlers: list[str] = []

        class Seen(HTMLParser):
            def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
                tags.add(tag)  # noqa: B023
                handlers.extend(k for k, _ in attrs if k.startswith("on"))  # noqa: B023

        Seen().feed(page)
        assert not {"script", "img", "iframe", "object"} & tags and not handlers and _is_plain(page.replace("\t", " "))
        assert "49" not in [w for w in page.split() if "7 * 7" in w]
    out, err = capfd.readouterr()
    assert _is_plain(out) and _is_plain(err)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {k: _renamed(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_renamed(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def _written(form: str, names: list[str]) -> str:
    stream = io.StringIO()
    found = [Prediction(name, (name,), (1.0,)) for name in names] + [Prediction("x", error=name) for name in names]
    write_predictions(found, stream, form=form, top=1)
    return stream.getvalue()


def test_tables_of_predictions_hold_no_formula() -> None:
    rows = list(csv.reader(io.StringIO(_written("csv", ALL), newline="")))
    assert len(rows) == 1 + 2 * len(ALL)
    for i, row in enumerate(rows[1:]):
        assert len(row) == 4
        for cell in row:
            assert cell[:1] not in tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20") or cell == ""
        name, cell = ALL[i % len(ALL)], row[0] if i < len(ALL) else row[3]
        plain = cell[1:] if cell.lstrip("'").startswith(tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")) else cell
        assert plain == name  # nothing is lost


def test_lines_of_predictions_say_the_same_and_command_nothing() -> None:
    names = [n for n in ALL if n != "\udcff"]
    text = _written("jsonl", names)
    assert _is_plain(text)
    assert [json.loads(line)["path"] for line in text.split("\n")[: len(names)]] == names


@pytest.mark.skipif(sys.platform == "darwin", reason="its pseudo-terminals change the text")
def test_predictions_that_are_printed_on_a_terminal(tmp_path: Path) -> None:
    """Into a file or a pipe, a name is what it is; on a terminal it is shown."""
    import pty

    program = (
        "import sys; from krdistill.commands.predict import _stream\n"
        "with _stream(None, 'csv') as stream: stream.write('a\\x1b[2J,\\u202eb,\\udcff\\n')"
    )
    there, here = pty.openpty()
    subprocess.run([sys.executable, "-c", program], stdout=here, check=True, timeout=120)
    os.close(here)
    shown = os.read(there, 4096).decode()
    assert shown.replace("\r\n", "\n") == "a\ufffd[2J,\ufffdb,\ufffd\n"
    piped = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=120).stdout
    assert piped == "a\x1b[2J,\u202eb,".encode() + b"\xff\n"
