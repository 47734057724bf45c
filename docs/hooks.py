"""What MkDocs is told beyond mkdocs.yml: links to files of the repository lead to copies; formulas are MathML."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).resolve().parents[1]
_PLACE = "repository"
_OUTSIDE = re.compile(r"\]\(\.\./([^)\s#]+)(#[^)\s]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the files of the repository that pages link to."""
    linked = set()
    for page in Path(config.docs_dir).glob("*.md"):
        linked |= {match[1] for match in _OUTSIDE.finditer(page.read_text(encoding="utf-8"))}
    for name in sorted(linked):
        if (_ROOT / name).is_file():
            files.append(File.generated(config, f"{_PLACE}/{_shown(name)}", abs_src_path=str(_ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turns ``../src/x.py`` into the copy's place; further down, one folder up is still within the site."""
    return markdown if "/" in page.file.src_uri else _OUTSIDE.sub(lambda m: f"]({_PLACE}/{_shown(m[1])})", markdown)


def on_page_content(page_html: str, **_: Any) -> str:
    """Turns TeX into MathML, which browsers show without a script."""
    return _FORMULA.sub(_mathml, page_html)


def _shown(name: str) -> str:
    """Source code as text, which a browser shows; a page of the repository would become one of the site."""
    return f"{name}.txt" if name.endswith((".py", ".md", ".yaml")) else name


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match[2] == "[" else "inline"
    return convert(html.unescape(match[3]).strip(), display=display)
